"""The sections of the benchmark: what each runs at which sizes, and its raw figures."""

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sidebyside.child import BENCH, Broken

from prefixindex.keys import measure_keys
from prefixindex.kvprocess import Load, measure_process
from prefixindex.population import PROMPT_BLOCKS
from prefixindex.redispath import RedisDuties, measure_redis
from prefixindex.replica import Duties

LENGTHS = (64, 1024, 8192)
Say = Callable[[str], None]
Figures = dict[str, Any]
_CHILD_S = 400.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `samples` are lookups per figure, `repeats` runs of one load on the kvstore process.

    `redis_holders`: workers that hold each of the widely held prompts in Redis.
    """

    blocks: tuple[int, ...]
    workers: tuple[int, ...]
    redis_blocks: tuple[int, ...]
    redis_holders: tuple[int, ...]
    memory_blocks: int
    samples: int
    budget_s: float
    churn_blocks: int
    repeats: int
    load_scale: int
    prompt_blocks: int = PROMPT_BLOCKS
    lengths: tuple[int, ...] = LENGTHS


FULL = Sizes(
    blocks=(100_000, 1_000_000, 10_000_000),
    workers=(8, 64, 512),
    redis_blocks=(100_000, 1_000_000, 10_000_000),
    redis_holders=(8, 64, 512),
    memory_blocks=300_000,
    samples=300,
    budget_s=3.0,
    churn_blocks=200_000,
    repeats=3,
    load_scale=4,
)
QUICK = Sizes(
    blocks=(100_000,),
    workers=(8, 512),
    redis_blocks=(100_000,),
    redis_holders=(8, 64),
    memory_blocks=40_000,
    samples=60,
    budget_s=0.4,
    churn_blocks=50_000,
    repeats=1,
    load_scale=1,
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the benchmark."""

    sizes: Sizes
    seed: int
    profile: bool
    say: Say


def replica(run: Run) -> list[Figures]:
    """Each size in a process of its own, so that memory is that of the index alone."""
    sizes, cells = run.sizes, []
    for blocks in sizes.blocks:
        for workers in sizes.workers:
            run.say(f"replica: {blocks:,} blocks, {workers} workers")
            duties = Duties(
                kind="lookups",
                blocks=blocks,
                workers=workers,
                seed=run.seed,
                prompt_blocks=sizes.prompt_blocks,
                lengths=sizes.lengths,
                samples=sizes.samples,
                budget_s=sizes.budget_s,
                churn_blocks=sizes.churn_blocks,
            )
            cells.append({"workers": workers} | in_child(duties))
    return cells


def memory(run: Run) -> Figures:
    sizes, workers = run.sizes, max(run.sizes.workers)
    run.say(f"memory: {sizes.memory_blocks:,} blocks, {workers} workers")
    duties = Duties("memory", sizes.memory_blocks, workers, run.seed, sizes.prompt_blocks)
    return {"workers": workers, "asked_blocks": sizes.memory_blocks} | in_child(duties)


def in_child(duties: Duties) -> Figures:
    """Raises `Broken` if the process fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "prefixindex.replica"],
            cwd=BENCH,
            input=json.dumps(asdict(duties)),
            capture_output=True,
            text=True,
            timeout=_CHILD_S,
        )
    except subprocess.TimeoutExpired:
        raise Broken(f"{duties.blocks:,} blocks, {duties.workers} workers: not done in {_CHILD_S:.0f} s") from None
    if done.returncode:
        raise Broken("\n".join(done.stderr.splitlines()[-15:]))
    figures: Figures = json.loads(done.stdout)
    return figures


def redis(run: Run) -> list[Figures]:
    sizes, cells = run.sizes, []
    for blocks in sizes.redis_blocks:
        run.say(f"redis: {blocks:,} blocks")
        duties = RedisDuties(
            blocks=blocks,
            workers=max(sizes.workers),
            seed=run.seed,
            prompt_blocks=sizes.prompt_blocks,
            spread=sizes.redis_holders,
            lengths=sizes.lengths,
            samples=sizes.samples // 3,
            budget_s=sizes.budget_s / 2,
        )
        cells.append(asyncio.run(measure_redis(duties)))
    return cells


def loads_of(scale: int) -> tuple[Load, ...]:
    """As fast as kvstore takes them, in two shapes and with more watches; then paced, for the delay."""
    return (
        Load("prefill, 1 watch", "prefill", workers=8, batches=50 * scale, watches=1),
        Load("prefill, 4 watches", "prefill", workers=8, batches=50 * scale, watches=4),
        Load("decode, 1 watch", "decode", workers=8, batches=50 * scale, watches=1),
        Load("decode, 4 watches", "decode", workers=8, batches=50 * scale, watches=4),
        Load("paced, 2 watches", "prefill", workers=8, batches=8 * scale, watches=2, interval_s=0.2),
    )


def process(run: Run) -> list[Figures]:
    """Loads take turns over the repeats; then, if asked for, each of the first kinds once under the profiler."""
    loads, taken = loads_of(run.sizes.load_scale), dict[str, list[Figures]]()
    for repeat in range(run.sizes.repeats):
        for load in loads:
            run.say(f"kvstore process: {load.name}, run {repeat + 1}")
            taken.setdefault(load.name, []).append(measure_process(load, run.seed))
    rows = [{"name": name, "runs": runs, "median": median_of(runs)} for name, runs in taken.items()]
    if run.profile:
        for row, load in zip(rows, loads, strict=True):
            if load.watches == 1:
                run.say(f"kvstore process: {load.name}, profiled")
                row["profile"] = measure_process(load, run.seed, profile=True)["profile"]
    return rows


def median_of(runs: Sequence[Mapping[str, Any]]) -> Figures:
    """The median of every number, in nested mappings too; other values are the first run's."""
    first = runs[0]
    result: Figures = {}
    for name, value in first.items():
        values = [run[name] for run in runs if name in run]
        if isinstance(value, Mapping):
            result[name] = median_of(values)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            result[name] = statistics.median(values)
        else:
            result[name] = value
    return result


def keys(run: Run) -> Figures:
    run.say("keys: second turn")
    tokens = max(run.sizes.lengths) * 16
    return measure_keys(tokens, min(1024, tokens // 2), run.sizes.samples, run.sizes.budget_s, run.seed)


SECTIONS: Mapping[str, Callable[[Run], Any]] = {
    "replica": replica,
    "memory": memory,
    "redis": redis,
    "process": process,
    "keys": keys,
}
