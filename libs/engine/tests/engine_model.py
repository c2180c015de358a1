"""A model of an engine's block cache and of the events it reports, to hold the mirror against."""

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_engine.ports import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored, Medium

BLOCK = 2


@dataclass(frozen=True)
class Prompt:
    """Whole blocks only; `extras` has one entry for each, or none at all."""

    tokens: tuple[int, ...]
    adapter: str = ""
    salt: str = ""
    extras: tuple[bytes, ...] = ()

    @property
    def keys(self) -> list[bytes]:
        joined = block_keys(self.tokens, BLOCK, root_key("m", self.adapter, self.salt), self.extras)
        return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]

    @property
    def hashes(self) -> list[bytes]:
        """The engine's own names, unlike our keys in everything but what they cover."""
        names, last = [], f"{self.adapter}/{self.salt}".encode()
        for index in range(len(self.tokens) // BLOCK):
            tokens = self.tokens[index * BLOCK : (index + 1) * BLOCK]
            extra = self.extras[index] if self.extras else b""
            last = hashlib.sha256(last + repr(tokens).encode() + extra).digest()[:8]
            names.append(last)
        return names


@dataclass
class CacheModel:
    """`capacity` blocks of HBM, each holding one hash; several may hold the same. Least recently used go first."""

    capacity: int
    events: list[BlockEvent] = field(default_factory=list)
    _blocks: "OrderedDict[int, bytes]" = field(default_factory=OrderedDict)
    _numbers: int = 0
    _offloaded: Counter[bytes] = field(default_factory=Counter)
    _key_of: dict[bytes, bytes] = field(default_factory=dict)

    def serve(self, prompt: Prompt, reuse: bool) -> None:
        """Compute a prompt, on top of what is cached if `reuse`; else as a request that ran beside another would."""
        hashes = prompt.hashes
        self._key_of.update(zip(hashes, prompt.keys, strict=True))
        cached = 0
        while reuse and cached < len(hashes) and hashes[cached] in self._blocks.values():
            cached += 1
        for block in [b for b, h in self._blocks.items() if h in hashes[:cached]]:
            self._blocks.move_to_end(block)
        missing = hashes[cached:]
        while len(self._blocks) + len(missing) > self.capacity:
            self.evict(next(iter(self._blocks)))
        for name in missing:
            self._numbers += 1
            self._blocks[self._numbers] = name
        if missing:
            self.events.append(self._stored(prompt, cached))

    def evict(self, block: int) -> None:
        self.events.append(BlocksRemoved([self._blocks.pop(block)]))

    def evict_nth(self, index: int) -> None:
        if self._blocks:
            self.evict(list(self._blocks)[index % len(self._blocks)])

    def offload_nth(self, index: int) -> None:
        """A connector copies a block to the host and names it by its hash alone."""
        if self._blocks:
            name = list(self._blocks.values())[index % len(self._blocks)]
            self._offloaded[name] += 1
            self.events.append(BlocksStored([name], None, (), 0, Medium.HOST))

    def forget_nth(self, index: int) -> None:
        """The host drops one of its copies."""
        if names := list(self._offloaded.elements()):
            name = names[index % len(names)]
            self._offloaded[name] -= 1
            self.events.append(BlocksRemoved([name], Medium.HOST))

    def clear(self) -> None:
        self._blocks.clear()
        self._offloaded.clear()
        self.events.append(BlocksCleared())

    def held(self) -> dict[Medium, set[bytes]]:
        """Our keys of what the engine holds, by medium; media without blocks are left out."""
        by_medium = {
            Medium.HBM: {self._key_of[name] for name in self._blocks.values()},
            Medium.HOST: {self._key_of[name] for name in self._offloaded.elements()},
        }
        return {medium: keys for medium, keys in by_medium.items() if keys}

    def take_events(self) -> list[BlockEvent]:
        events, self.events = self.events, []
        return events

    def _stored(self, prompt: Prompt, cached: int) -> BlocksStored:
        hashes = prompt.hashes
        return BlocksStored(
            hashes[cached:],
            hashes[cached - 1] if cached else None,
            prompt.tokens[cached * BLOCK :],
            BLOCK,
            cache_salt="" if cached else prompt.salt,
            adapter=prompt.adapter,
            extras=prompt.extras[cached:],
        )
