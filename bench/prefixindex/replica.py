"""One process, one index size: the proxy's replica and a dict of sets, filled alike and asked in turns.

Reads what to do as JSON from standard input and prints what it found as JSON.
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import psutil

from omni_common.blocks import KEY_BYTES
from omni_common.prefix_index import PrefixIndex, warm_up
from prefixindex.baselines import DictIndex
from prefixindex.population import HBM, SPREAD_PROMPTS, Population, Prompt, Run, populate, runs_of, worker_names
from prefixindex.timing import OtherWork, latency_of, timed

MESSAGE_BLOCKS = (1, 16, 128)
_RUNS_HELD = 64
_SHARED_BY = 3
_ROUNDS = 3
_CHECKED = 100
Lookup = Callable[[bytes], object]


class Wrong(Exception):
    """An index gave another answer than the population's."""


@dataclass(frozen=True, slots=True)
class Duties:
    """`kind` lookups: latencies and ingest of both; memory: bytes of the replica under two kinds of sharing.

    `samples` lookups per figure of the replica, at most `budget_s` long, and a tenth as many of the dict.
    """

    kind: Literal["lookups", "memory"]
    blocks: int
    workers: int
    seed: int
    prompt_blocks: int
    lengths: Sequence[int] = ()
    samples: int = 0
    budget_s: float = 0.0
    churn_blocks: int = 0
    has_baseline: bool = True


def measure_lookups(duties: Duties) -> dict[str, Any]:
    """Figures of one index size and count of workers."""
    spread = [duties.workers] * SPREAD_PROMPTS
    population = populate(duties.blocks, duties.workers, duties.seed, spread=spread, prompt_blocks=duties.prompt_blocks)
    runs = list(population.runs())
    ours, built = _filled(population, runs)
    figures: dict[str, Any] = {"ours": built | _usage(ours)}
    systems: dict[str, Lookup] = {"ours": ours.lookup, "ours, all workers read": partial(_every_row, ours)}
    check(population, partial(_depths, ours), duties.lengths)
    if duties.has_baseline:
        known, figures["dict"] = _filled_dict(runs)
        check(population, known.lookup, duties.lengths)
        systems["dict"] = known.lookup
    gc.freeze()
    figures["lookups"] = _latencies(duties, population, systems)
    messages = {size: churn(duties.workers, size, duties.churn_blocks, duties.seed) for size in MESSAGE_BLOCKS}
    figures["ours"]["events_per_s"] = {size: _churn_ours(ours, m) for size, m in messages.items()}
    if duties.has_baseline:
        figures["dict"]["events_per_s"] = {size: _churn_dict(known, m) for size, m in messages.items()}
    return figures | {"blocks": population.num_blocks, "entries": population.num_entries}


def _filled(population: Population, runs: Sequence[Run]) -> tuple[PrefixIndex, dict[str, float]]:
    before = _rss()
    index = PrefixIndex(max_blocks=2 * population.num_blocks)
    for worker in population.workers:
        index.join(worker)
    start_s = time.perf_counter()
    for run in runs:
        index.store(run.worker, HBM, run.keys, [run.first])
    seconds = time.perf_counter() - start_s
    return index, {"fill_s": seconds, "fill_per_s": population.num_entries / seconds, "rss_bytes": _rss() - before}


def _filled_dict(runs: Sequence[Run]) -> tuple[DictIndex, dict[str, Any]]:
    before, entries = _rss(), sum(len(run.keys) for run in runs) // KEY_BYTES
    index = DictIndex()
    gc.disable()  # its passes over millions of sets would be most of the time
    start_s = time.perf_counter()
    for run in runs:
        index.store(run.worker, run.keys)
    seconds = time.perf_counter() - start_s
    return index, {"fill_s": seconds, "fill_per_s": entries / seconds, "rss_bytes": _rss() - before}


def _usage(index: PrefixIndex) -> dict[str, int]:
    usage = index.usage()
    return {
        "bytes": usage.bytes,
        "blocks": usage.blocks,
        "entries": usage.entries,
        "holder_sets": usage.holder_sets,
        "capacity_blocks": usage.capacity_blocks,
    }


def _depths(index: PrefixIndex, keys: bytes) -> dict[str, int]:
    return {worker: max(blocks) for worker, blocks in index.lookup(keys).rows() if worker}


def _every_row(index: PrefixIndex, keys: bytes) -> object:
    return list(index.lookup(keys).rows())


def check(population: Population, lookup: Callable[[bytes], dict[str, int]], lengths: Sequence[int]) -> None:
    """Raises `Wrong` if a lookup of one of the first prompts has another answer than the population says."""
    for prompt in population.prompts[:_CHECKED]:
        for blocks in lengths:
            found = lookup(prompt.keys[: blocks * KEY_BYTES])
            if found != prompt.expected(blocks):
                raise Wrong(f"a prompt of {blocks} blocks: {len(found)} workers, or their blocks, are not as stored")


def _latencies(duties: Duties, population: Population, systems: dict[str, Lookup]) -> list[dict[str, Any]]:
    """Every system on every length and kind of prompt, in turns; each lookup another prompt than the one before."""
    kinds: dict[str, Sequence[Prompt]] = {"spread": population.spread, "own": population.own}
    befores: dict[str, Callable[[], object]] = {"cold": OtherWork(), "warm": _nothing}
    taken: dict[tuple[str, int, str, str], list[float]] = {}
    for _ in range(_ROUNDS):
        for (kind, prompts), blocks in itertools.product(kinds.items(), duties.lengths):
            asked = [prompt.keys[: blocks * KEY_BYTES] for prompt in prompts]
            for (name, lookup), (caches, before) in itertools.product(systems.items(), befores.items()):
                most = duties.samples if name != "dict" else duties.samples // 10
                seconds = timed(
                    _calls(lookup, asked), before, most=max(3, most // _ROUNDS), budget_s=duties.budget_s / _ROUNDS
                )
                taken.setdefault((kind, blocks, name, caches), []).extend(seconds)
    return [
        {"kind": kind, "blocks": blocks, "system": name, "caches": caches} | asdict(latency_of(seconds))
        for (kind, blocks, name, caches), seconds in taken.items()
    ]


def _calls(lookup: Lookup, asked: Sequence[bytes]) -> Iterator[Callable[[], object]]:
    for keys in itertools.cycle(asked):
        yield partial(lookup, keys)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Message:
    is_store: bool
    worker: str
    keys: bytes
    first: int


def churn(workers: int, size: int, blocks: int, seed: int) -> list[Message]:
    """Messages of `size` blocks: a run stored, and once 64 runs are held, the oldest of them removed."""
    rng = np.random.default_rng([seed, size])
    names = worker_names(workers)
    stores = [
        Message(True, names[i % workers], rng.bytes(size * KEY_BYTES), int(rng.integers(0, 1024 // size)) * size)
        for i in range(max(1, blocks // size // 2))
    ]
    messages: list[Message] = []
    for number, message in enumerate(stores):
        messages.append(message)
        if number >= _RUNS_HELD:
            old = stores[number - _RUNS_HELD]
            messages.append(Message(False, old.worker, old.keys, old.first))
    return messages


def _churn_ours(index: PrefixIndex, messages: Sequence[Message]) -> float:
    start_s = time.perf_counter()
    for message in messages:
        if message.is_store:
            index.store(message.worker, HBM, message.keys, [message.first])
        else:
            index.remove(message.worker, HBM, message.keys)
    return _blocks_of(messages) / (time.perf_counter() - start_s)


def _churn_dict(index: DictIndex, messages: Sequence[Message]) -> float:
    start_s = time.perf_counter()
    for message in messages:
        (index.store if message.is_store else index.remove)(message.worker, message.keys)
    return _blocks_of(messages) / (time.perf_counter() - start_s)


def _blocks_of(messages: Sequence[Message]) -> int:
    return sum(len(m.keys) for m in messages) // KEY_BYTES


def measure_memory(duties: Duties) -> dict[str, Any]:
    """Bytes per entry: every block on one worker, at every size on the way; and every block on three drawn anew."""
    return {
        "one holder": _grown(duties, _alone(duties)),
        "three holders at random": _grown(duties, _scattered(duties)),
    }


def _alone(duties: Duties) -> Iterator[Run]:
    rng = np.random.default_rng(duties.seed)
    names = worker_names(duties.workers)
    for number in range(duties.blocks // duties.prompt_blocks):
        yield from runs_of(names[number % duties.workers], rng.bytes(duties.prompt_blocks * KEY_BYTES))


def _scattered(duties: Duties) -> Iterator[Run]:
    rng = np.random.default_rng(duties.seed)
    names = worker_names(duties.workers)
    for _ in range(duties.blocks):
        key = rng.bytes(KEY_BYTES)
        for number in rng.choice(duties.workers, _SHARED_BY, replace=False):
            yield Run(names[number], key, key, 0)


def _grown(duties: Duties, runs: Iterator[Run]) -> dict[str, float]:
    index = PrefixIndex(max_blocks=2 * duties.blocks)
    for worker in worker_names(duties.workers):
        index.join(worker)
    worst, step = 0.0, max(1, duties.blocks // 100)
    seen = 0
    for run in runs:
        index.store(run.worker, HBM, run.keys, [run.first])
        seen += len(run.keys) // KEY_BYTES
        if seen >= step:
            seen = 0
            usage = index.usage()
            # Below a tenth of the size what is fixed weighs more than what grows.
            if usage.blocks > duties.blocks // 10:
                worst = max(worst, usage.bytes / usage.entries)
    usage = index.usage()
    return {
        "bytes_per_entry": usage.bytes / usage.entries,
        "worst_bytes_per_entry": max(worst, usage.bytes / usage.entries),
        "bytes_per_block": usage.bytes / usage.blocks,
        "blocks": usage.blocks,
        "holder_sets": usage.holder_sets,
    }


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    duties = Duties(**json.load(sys.stdin))
    warm_up()
    measure = measure_lookups if duties.kind == "lookups" else measure_memory
    json.dump(measure(duties), sys.stdout)


if __name__ == "__main__":
    main()
