"""What an index under test holds, and the prompts looked up in it. Pure, and the same for every system."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS

PROMPT_BLOCKS = 8192
BLOCK_TOKENS = 16
MODEL = "m"
HBM = 1
SPREAD_PROMPTS = 4
_OWN_HOLDERS = 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """`keys` of all blocks in order; `depths` has the blocks each holder keeps, from the first."""

    keys: bytes
    depths: dict[str, int]

    def expected(self, blocks: int) -> dict[str, int]:
        """The right answer to a lookup of the first `blocks`."""
        return {worker: min(depth, blocks) for worker, depth in self.depths.items()}


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one prompt in one span that a worker stores at once."""

    worker: str
    keys: bytes
    span: bytes
    first: int


@dataclass(frozen=True, slots=True)
class Population:
    """`spread` prompts lie on many workers, to a depth of its own on each; `own` ones on two workers."""

    workers: tuple[str, ...]
    spread: tuple[Prompt, ...]
    own: tuple[Prompt, ...]

    @property
    def num_blocks(self) -> int:
        return sum(len(p.keys) // KEY_BYTES for p in self.prompts)

    @property
    def num_entries(self) -> int:
        """Pairs of block and worker."""
        return sum(sum(p.depths.values()) for p in self.prompts)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.spread + self.own

    def runs(self) -> Iterator[Run]:
        """All that is held, one worker's part of one span at a time."""
        for prompt in self.prompts:
            for worker, depth in prompt.depths.items():
                yield from runs_of(worker, prompt.keys[: depth * KEY_BYTES])


def runs_of(worker: str, keys: bytes) -> Iterator[Run]:
    """A prompt's blocks, cut at its spans."""
    step = SPAN_BLOCKS * KEY_BYTES
    for offset in range(0, len(keys), step):
        piece = keys[offset : offset + step]
        yield Run(worker, piece, piece[:KEY_BYTES], offset // KEY_BYTES)


def populate(
    blocks: int, workers: int, seed: int, *, spread: Sequence[int], prompt_blocks: int = PROMPT_BLOCKS
) -> Population:
    """About `blocks` blocks in prompts of `prompt_blocks`; one spread prompt per count of holders in `spread`.

    Keys are random, as hashes are.
    """
    rng = np.random.default_rng(seed)
    names = worker_names(workers)
    own = max(1, blocks // prompt_blocks - len(spread))
    holders = [*spread, *[_OWN_HOLDERS] * own]
    prompts = tuple(_prompt(rng, names, min(count, workers), prompt_blocks) for count in holders)
    return Population(names, prompts[: len(spread)], prompts[len(spread) :])


def _prompt(rng: np.random.Generator, names: Sequence[str], holders: int, blocks: int) -> Prompt:
    """One holder has all of it, the others any part."""
    depths: dict[str, int] = {}
    for number in rng.choice(len(names), holders, replace=False):
        depths[names[number]] = int(rng.integers(1, blocks + 1)) if depths else blocks
    return Prompt(rng.bytes(blocks * KEY_BYTES), depths)


def worker_names(count: int) -> tuple[str, ...]:
    return tuple(f"worker-{number:03}" for number in range(count))
