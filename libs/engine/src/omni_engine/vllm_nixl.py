"""NIXL's pull connector, which throws away what it pulled after the lease had ended (`kv_connector_module_path`).

The holder gives blocks whose lease ran out to other requests. An engine that was stopped or cut off meanwhile reads
them all the same: it would go on with another request's keys and values, and keep them in its prefix cache. The holder
can only log that it happened.
"""

import logging
import time
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as nixl

from omni_engine.vllm_leases import CLOCKS_DIFFER_S, LEASE_BEGAN, LEASE_ENDS

log = logging.getLogger(__name__)


class UntilLeaseEnds:
    """Mixed into a pull connector: a pull that ended too late counts as failed, so that the engine computes the prompt.

    The clocks of the two engines' machines may differ by a second.
    """

    connector_scheduler: Any
    _connector_metadata: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pulls: dict[str, tuple[float, set[int]]] = {}
        self._late_blocks: set[int] = set()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        began_s = time.time()  # before the connector reads its own clock: this process may be stopped between the two
        is_held, params = super().request_finished_all_groups(request, block_ids)  # type: ignore[misc]
        return is_held, params and params | {LEASE_BEGAN: began_s}

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        ends = _ends_of(self.connector_scheduler)
        metadata: Any = super().build_connector_meta(scheduler_output)  # type: ignore[misc]
        metadata.omni_lease_ends_s = ends
        return metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._connector_metadata
        for name, ends_s in metadata.omni_lease_ends_s.items():
            groups = metadata.reqs_to_recv[name].local_block_ids
            self._pulls[name] = ends_s, set(groups[0]) if len(groups) == 1 else set()
        super().start_load_kv(forward_context, **kwargs)  # type: ignore[misc]

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results: Any = super().get_transfer_results(finished_req_ids)  # type: ignore[misc]
        late = self._late(results.finished_recving)
        return replace(results, failed_recving=results.failed_recving | late.keys()) if late else results

    def get_finished(self, finished_req_ids: set[str]) -> Any:
        """What vLLM 0.27 asks instead; it is told of failures by blocks, of models with one group of layers only."""
        sent, received = super().get_finished(finished_req_ids)  # type: ignore[misc]
        self._late_blocks.update(*self._late(received).values())
        return sent, received

    def get_block_ids_with_load_errors(self) -> set[int]:
        late, self._late_blocks = self._late_blocks, set()
        failed: set[int] = super().get_block_ids_with_load_errors()  # type: ignore[misc]
        return failed | late

    def _late(self, received: set[str]) -> dict[str, set[int]]:
        """Blocks of the pulls that ended too late."""
        now_s = time.time() + CLOCKS_DIFFER_S
        pulls = {name: self._pulls.pop(name) for name in received & self._pulls.keys()}
        late = {name: blocks for name, (ends_s, blocks) in pulls.items() if ends_s < now_s}
        if late:
            log.warning("pulled after the lease had ended; computed again", extra={"requests": len(late)})
        return late


class NixlConnector(UntilLeaseEnds, nixl.NixlConnector):  # type: ignore[misc]
    """Of the name that vLLM looks for in its configuration."""


def _ends_of(scheduler: Any) -> dict[str, float]:
    """Of the pulls that the workers are about to be told of, request id -> Unix seconds."""
    return {
        name: request.kv_transfer_params[LEASE_ENDS]
        for name, (request, blocks, *_) in scheduler._reqs_need_recv.items()
        if any(blocks) and LEASE_ENDS in request.kv_transfer_params
    }
