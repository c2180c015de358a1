"""Changes that the kvstore has not been told of, and block events as the kvstore takes them."""

from collections.abc import Iterable, Iterator, Sequence

from omni.kvstore.v1 import kvstore_service_pb2 as kvstore
from omni_engine.hosting.mirror import Block, Change
from omni_engine.hosting.wire import MEDIA
from omni_engine.ports import Medium


class Pending:
    """The last word on each (medium, key) since the last `take`, so the order of what is left does not matter.

    A block removed and stored again is stored. Single removals of one span leave as one event.
    """

    def __init__(self) -> None:
        self._by_span: dict[tuple[Medium, bytes], dict[bytes, Change]] = {}
        self._is_cleared = False
        self._count = 0
        self.occurred_unix_ms = 0

    def __len__(self) -> int:
        """Blocks, and one for a clearing."""
        return self._count + self._is_cleared

    def add(self, changes: Iterable[Change], occurred_unix_ms: int) -> None:
        self.occurred_unix_ms = self.occurred_unix_ms or occurred_unix_ms
        for change in changes:
            span = self._by_span.setdefault((change.medium, change.block.span), {})
            self._count += change.block.key not in span
            span[change.block.key] = change

    def add_clearing(self, occurred_unix_ms: int) -> None:
        """What was added before does not matter any more."""
        self.reset()
        self._is_cleared = True
        self.occurred_unix_ms = occurred_unix_ms

    def reset(self) -> None:
        """Forget everything."""
        self._by_span, self._count = {}, 0
        self._is_cleared = False
        self.occurred_unix_ms = 0

    def take(self, max_blocks: int) -> Iterator[list[kvstore.BlockEvent]]:
        """All that is pending, in lists of at most `max_blocks` blocks; pending is empty from the first one on."""
        by_span, is_cleared = self._by_span, self._is_cleared
        self.reset()
        events = [kvstore.BlockEvent(action=kvstore.BLOCK_ACTION_CLEARED)] if is_cleared else []
        room = max_blocks
        for (medium, _), changes in by_span.items():
            for is_held in (False, True):
                blocks = sorted((c.block for c in changes.values() if c.is_held is is_held), key=_position)
                while blocks:
                    if room == 0:
                        yield events
                        events, room = [], max_blocks
                    part, blocks = blocks[:room], blocks[room:]
                    events.append(block_event(medium, part, is_held))
                    room -= len(part)
        if events:
            yield events


def stored_events(medium: Medium, blocks: Iterable[Block]) -> list[kvstore.BlockEvent]:
    """One event for each span."""
    by_span: dict[bytes, list[Block]] = {}
    for block in blocks:
        by_span.setdefault(block.span, []).append(block)
    return [block_event(medium, sorted(span, key=_position), is_held=True) for span in by_span.values()]


def block_event(medium: Medium, blocks: Sequence[Block], is_held: bool) -> kvstore.BlockEvent:
    """Blocks of one span, by position. Only what is stored carries positions: one if they follow each other."""
    first = blocks[0].position
    positions = [block.position for block in blocks]
    if positions == list(range(first, first + len(blocks))):
        positions = [first]
    return kvstore.BlockEvent(
        action=kvstore.BLOCK_ACTION_STORED if is_held else kvstore.BLOCK_ACTION_REMOVED,
        medium=MEDIA[medium],
        block_keys=b"".join(block.key for block in blocks),
        span=blocks[0].span,
        positions=positions if is_held else (),
    )


def _position(block: Block) -> int:
    return block.position
