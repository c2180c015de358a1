"""Runs inside vLLM's worker processes, through its `worker_extension_cls` hook: leases and core pinning."""

import os
from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker class; called by `collective_rpc`. Names are prefixed so as not to clash."""

    local_rank: int

    def omni_pin(self, cores_by_rank: list[list[int]]) -> None:
        """Bind the worker's main thread, which computes too, to its own cores.

        On CPU the NIXL connector moves it to the last core of its NUMA node, the same for every engine there.
        """
        os.sched_setaffinity(0, cores_by_rank[self.local_rank])

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


def _waiting() -> dict[str, float]:
    """The connector's own table, request id -> expiry on its monotonic clock."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return {}
    connector: Any = get_kv_transfer_group()
    table: dict[str, float] = connector.connector_worker._reqs_to_send
    return table
