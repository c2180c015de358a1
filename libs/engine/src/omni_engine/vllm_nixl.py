"""NIXL's pull connector, which throws away what it pulled after the lease had ended (`kv_connector_module_path`).

The holder gives blocks whose lease ran out to other requests. An engine that was stopped or cut off meanwhile reads
them all the same: it would go on with another request's keys and values, and keep them in its prefix cache. The holder
can only log that it happened.
"""

import logging
import math
import time
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as nixl

from omni_engine.vllm_leases import LEASE_ENDS

log = logging.getLogger(__name__)

_CLOCKS_DIFFER_S = 1.0
_REPORTS_FAILURES = hasattr(nixl.NixlConnector, "get_transfer_results")  # vLLM 0.32


class UntilLeaseEnds:
    """Mixed into a pull connector: a pull that ended too late counts as failed, so that the engine computes the prompt.

    The clocks of the two engines' machines may differ by a second.
    """

    connector_scheduler: Any
    _connector_metadata: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends_s: dict[str, float] = {}

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        ends = _ends_of(self.connector_scheduler) if _REPORTS_FAILURES else {}
        metadata: Any = super().build_connector_meta(scheduler_output)  # type: ignore[misc]
        metadata.omni_lease_ends_s = ends
        return metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._ends_s |= self._connector_metadata.omni_lease_ends_s
        super().start_load_kv(forward_context, **kwargs)  # type: ignore[misc]

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results: Any = super().get_transfer_results(finished_req_ids)  # type: ignore[misc]
        now_s = time.time() + _CLOCKS_DIFFER_S
        late = {name for name in results.finished_recving if self._ends_s.pop(name, math.inf) < now_s}
        if not late - results.failed_recving:
            return results
        log.warning("pulled after the lease had ended; computed again", extra={"requests": len(late)})
        return replace(results, failed_recving=results.failed_recving | late)


class NixlConnector(UntilLeaseEnds, nixl.NixlConnector):  # type: ignore[misc]
    """Of the name that vLLM looks for in its configuration."""


def _ends_of(scheduler: Any) -> dict[str, float]:
    """Of the pulls that the workers are about to be told of, request id -> Unix seconds."""
    return {
        name: request.kv_transfer_params[LEASE_ENDS]
        for name, (request, _, _, awaits_blocks) in scheduler._reqs_need_recv.items()
        if awaits_blocks and LEASE_ENDS in request.kv_transfer_params
    }
