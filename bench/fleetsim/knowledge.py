"""The proxy's replica in the simulation: the product's prefix index, without kvstore and event loop."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from omni_common.prefix_index import HBM, Prefixes, PrefixIndex
from omni_engine.ports import BlockEvent, BlocksRemoved, BlocksStored
from omni_proxy.replica import Holder
from omni_proxy.scheduling.forecast import LoadCost

_WHILE_RUNNING_S = 1e6
NO_OTHER_TIERS = {name: LoadCost(0.0, 0.0) for name in ("host", "disk", "remote")}


class Knowledge:
    """Stands where `omni_proxy.fleet.Fleet` wants a `Replica`. `positions`: of every key in its prompt."""

    pool_costs: Mapping[str, LoadCost] = {}

    def __init__(
        self, max_blocks: int, clock: Callable[[], float], positions: Mapping[bytes, int], *, marks_s: float
    ) -> None:
        self._index = PrefixIndex(max_blocks=max_blocks, clock=clock)
        self._positions = positions
        self._marks_s = marks_s

    def adopt(self, holder: Holder) -> None:
        self._index.join(holder.id)

    def lookup(self, keys: bytes, block_size: int) -> Prefixes:
        return self._index.lookup(keys)

    def dispatched(self, worker_id: str, keys: bytes) -> None:
        self._index.expect(worker_id, keys, _WHILE_RUNNING_S)

    def computed(self, worker_id: str, keys: bytes) -> None:
        """A mark outlives the computing until the worker's own word comes."""
        self._index.expect(worker_id, keys, self._marks_s)

    def reported(self, worker_id: str, events: Sequence[BlockEvent]) -> None:
        for kind, group in itertools.groupby(events, type):
            keys = [key for event in group for key in getattr(event, "block_hashes", ())]
            if kind is BlocksStored:
                self._index.store(worker_id, HBM, b"".join(keys), [self._positions[key] for key in keys])
            elif kind is BlocksRemoved:
                self._index.remove(worker_id, HBM, b"".join(keys))
