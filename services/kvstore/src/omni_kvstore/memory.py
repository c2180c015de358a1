"""What one replica remembers of blocks, for lookups and snapshots while Redis is away, and for snapshots always."""

from collections.abc import Iterable, Iterator

from omni_common.blocks import KEY_BYTES
from omni_common.prefix_index import PrefixIndex, Usage
from omni_kvstore.blocks import Action, Batch, BlockChange, BlockEvent, Match, pack_positions, unpack_positions
from omni_kvstore.membership import Worker, WorkerChange


class BlockMemory:
    """Members' blocks, and the last batch of each that came past here."""

    def __init__(self, max_blocks: int) -> None:
        self._index = PrefixIndex(max_blocks=max_blocks)
        self._sequences: dict[str, int] = {}

    def members_changed(self, changes: Iterable[WorkerChange]) -> None:
        for change in changes:
            worker = change.worker
            if change.removed:
                self._index.leave(worker.worker_id)
                self._sequences.pop(worker.worker_id, None)
            else:
                self._index.join(worker.worker_id, pool_medium=worker.pool_medium or None)

    def blocks_changed(self, changes: Iterable[BlockChange]) -> None:
        """Apply changes of members; the caller has dropped those of others."""
        for change in changes:
            event = change.event
            match event.action:
                case Action.STORED:
                    self._index.store(change.worker_id, event.medium, event.keys, unpack_positions(event.positions))
                case Action.REMOVED:
                    self._index.remove(change.worker_id, event.medium, event.keys)
                case Action.CLEARED:
                    self._index.clear(change.worker_id)

    def note(self, worker_id: str, sequence: int) -> None:
        """Redis has taken the worker's batch of this number."""
        self._sequences[worker_id] = sequence

    def follows(self, batch: Batch) -> bool:
        """The batch can be applied to what is here: it comes next, or replaces everything."""
        return batch.snapshot or self._sequences.get(batch.worker_id) == batch.sequence - 1

    def has_seen(self, batch: Batch) -> bool:
        return not batch.snapshot and batch.sequence <= self._sequences.get(batch.worker_id, 0)

    def last_sequence(self, worker_id: str) -> int:
        return self._sequences.get(worker_id, 0)

    def lookup(self, keys: bytes) -> list[Match]:
        """How far each worker's prefix of `keys` reaches, tier by tier."""
        prefixes = self._index.lookup(keys)
        matches = []
        for worker_id, depths in prefixes.rows():
            reached = 0
            for tier, depth in zip(prefixes.tiers, depths, strict=True):
                if depth > reached:
                    matches.append(Match(worker_id, tier.medium, tier.pool, depth))
                    reached = depth
        return matches

    def held(self, worker: Worker) -> Iterator[BlockChange]:
        """All blocks of a member, in pages, as they are now."""
        for medium, keys, positions in list(self._index.held(worker.worker_id)):
            event = BlockEvent(Action.STORED, medium, keys, positions=pack_positions(positions))
            yield BlockChange(worker.worker_id, worker.epoch, event, worker.model)

    def count(self, worker_id: str) -> int:
        """Blocks of a member, once per medium."""
        return sum(len(keys) // KEY_BYTES for _, keys, _ in self._index.held(worker_id))

    def usage(self) -> Usage:
        return self._index.usage()
