"""Which prompt blocks were sent to which worker: an estimate of its prefix cache from own routing alone."""

from collections import OrderedDict

from omni_common.blocks import KEY_BYTES


class PrefixHistory:
    """Per worker the most recently used block keys, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self._capacity = capacity
        self._keys: dict[str, OrderedDict[bytes, None]] = {}

    def record(self, worker_id: str, block_keys: bytes) -> None:
        """The worker holds the blocks of this prompt."""
        held = self._keys.setdefault(worker_id, OrderedDict())
        # From the tail, so that a prompt longer than the capacity keeps its head.
        for offset in range(len(block_keys) - KEY_BYTES, -1, -KEY_BYTES):
            key = block_keys[offset : offset + KEY_BYTES]
            held[key] = None
            held.move_to_end(key)
        while len(held) > self._capacity:
            held.popitem(last=False)

    def cached_blocks(self, worker_id: str, block_keys: bytes) -> int:
        """Leading blocks the worker probably holds."""
        held = self._keys.get(worker_id)
        if not held:
            return 0
        count = 0
        for offset in range(0, len(block_keys), KEY_BYTES):
            if block_keys[offset : offset + KEY_BYTES] not in held:
                break
            count += 1
        return count

    def forget(self, worker_id: str) -> None:
        """The worker restarted or left."""
        self._keys.pop(worker_id, None)
