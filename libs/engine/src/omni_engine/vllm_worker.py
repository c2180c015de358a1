"""Runs inside vLLM's worker processes, through its `worker_extension_cls` hook: leases, core pinning, experts."""

import os
from dataclasses import asdict
from typing import Any

import numpy as np

from omni_engine.ports import ExpertMove


class WorkerExtension:
    """Mixed into vLLM's worker class; called by `collective_rpc`. Names are prefixed so as not to clash."""

    local_rank: int
    vllm_config: Any
    model_runner: Any

    def omni_pin(self, cores_by_rank: list[list[int]]) -> None:
        """Bind the worker's main thread, which computes too, to its own cores.

        On CPU the NIXL connector moves it to the last core of its NUMA node, the same for every engine there.
        """
        parallel = self.vllm_config.parallel_config
        first_rank = (parallel.data_parallel_rank_local or 0) * parallel.world_size
        os.sched_setaffinity(0, cores_by_rank[first_rank + self.local_rank])

    def omni_kernel_calls(self) -> dict[str, dict[str, int]]:
        """op -> backend -> calls in this process."""
        from omni_kernels.vllm.usage import calls

        return calls()

    def omni_held_leases(self) -> list[str]:
        """Requests whose blocks wait to be pulled by another engine."""
        return list(_waiting())

    def omni_release_leases(self, lease_ids: list[str]) -> list[str]:
        """Let the leases named expire at the engine's next step; returns those that were held."""
        waiting = _waiting()
        held = [lease_id for lease_id in lease_ids if lease_id in waiting]
        for lease_id in held:
            waiting[lease_id] = 0.0
        return held

    def omni_expert_layout(self) -> dict[str, Any]:
        """The layout in force, little-endian int32 of the shape given, and the ranks nothing is routed to.

        `hosts` has a number for each rank's machine.
        """
        state = self.model_runner.eplb_state
        return {
            "version": state.version,
            "shape": list(state.physical.shape),
            "physical": state.physical.astype("<i4").tobytes(),
            "dropped": list(state.dropped),
            "hosts": state.hosts.tolist(),
            "expert_bytes": state.expert_bytes,
        }

    def omni_expert_load(self) -> dict[str, Any]:
        load: dict[str, Any] = self.model_runner.eplb_state.take_load()
        return load

    def omni_expert_digests(self) -> list[list[str]]:
        digests: list[list[str]] = self.model_runner.eplb_state.digests()
        return digests

    def omni_expert_round(self, message: dict[str, Any], arm_only: bool) -> dict[str, Any]:
        """Run a round in this call, on all workers at once, or arm it for the next common step boundary."""
        state = self.model_runner.eplb_state
        round_ = _round(message, state.physical.shape)
        if arm_only:
            state.armed = round_
        else:
            state.apply(round_)
        return self.omni_expert_outcome()

    def omni_expert_disarm(self) -> dict[str, Any]:
        self.model_runner.eplb_state.armed = None
        return self.omni_expert_outcome()

    def omni_expert_outcome(self) -> dict[str, Any]:
        return asdict(self.model_runner.eplb_state.outcome)

    def omni_drop_ranks(self, ranks: list[int]) -> None:
        self.model_runner.eplb_state.drop(ranks)


def _round(message: dict[str, Any], shape: tuple[int, ...]) -> Any:
    from omni_engine.vllm_expert_state import Round

    return Round(
        message["number"],
        message["version"],
        tuple(ExpertMove(*move) for move in message["moves"]),
        np.frombuffer(message["physical"], dtype="<i4").reshape(shape),
        tuple(message["dropped"]),
    )


def _waiting() -> dict[str, float]:
    """The connector's own table, request id -> expiry on its monotonic clock."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return {}
    connector: Any = get_kv_transfer_group()
    table: dict[str, float] = connector.connector_worker._reqs_to_send
    return table
