"""Measure the prefix index: the proxy's replica, lookups through Redis, one kvstore process, block keys.

    python bench/kvstore.py --quick
    python bench/kvstore.py --profile --json kvstore.json --markdown kvstore.md
    python bench/kvstore.py --only replica,redis

Baselines, in the same run and on the same data: a plain Python dict of sets for the replica, and for Redis one command
per block (HKEYS of a hash per block, in one pipeline) as llm-d's index does. Answers are checked before they are timed.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from prefixindex.goals import goals_of
from prefixindex.others import Others
from prefixindex.redisserver import NoRedis
from prefixindex.report import blocks_of, last_lines
from prefixindex.sections import FULL, QUICK, SECTIONS, Run, Sizes
from rich.console import Console
from sidebyside.child import Broken
from sidebyside.machine import machine
from sidebyside.tables import markdown, show

PACKAGES = ("numpy", "numba", "redis", "hiredis", "grpcio", "protobuf", "uvloop", "omni-common", "omni-kvstore")


def sizes_of(quick: bool, blocks: str, redis_blocks: str, workers: str) -> Sizes:
    """The full or quick sizes, where the command line names no others."""

    def numbers(text: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(float(part)) for part in text.split(",")) if text else default

    sizes = QUICK if quick else FULL
    return replace(
        sizes,
        blocks=numbers(blocks, sizes.blocks),
        redis_blocks=numbers(redis_blocks, sizes.redis_blocks),
        workers=numbers(workers, sizes.workers),
    )


def main(
    quick: Annotated[bool, typer.Option(help="Small sizes, under a minute")] = False,
    only: Annotated[str, typer.Option(help=f"Sections: {', '.join(SECTIONS)}")] = "",
    blocks: Annotated[str, typer.Option(help="Sizes of the replica, such as 1e5,1e6")] = "",
    redis_blocks: Annotated[str, typer.Option(help="Sizes of the index in Redis")] = "",
    workers: Annotated[str, typer.Option(help="Counts of workers")] = "",
    profile: Annotated[bool, typer.Option(help="Also run kvstore under a profiler")] = False,
    seed: Annotated[int, typer.Option()] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here")] = None,
) -> None:
    """Measure the prefix index and its baselines on this machine."""
    log = Console(stderr=True, log_path=False, width=140)
    wanted = only.split(",") if only else list(SECTIONS)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise typer.BadParameter(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    run = Run(
        sizes_of(quick, blocks, redis_blocks, workers), seed, profile, lambda line: log.log(line, highlight=False)
    )
    facts, results, foreign = machine(PACKAGES), dict[str, Any](), dict[str, float]()
    began_s = time.monotonic()
    try:
        for name in wanted:
            others = Others()
            results[name] = SECTIONS[name](run)
            foreign[name] = others.share()
    except (Broken, NoRedis) as error:
        log.print(f"[red]failed:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    console = Console()
    wide = Console(width=max(console.width, 190))
    wide.print(", ".join(f"{name}: {value}" for name, value in facts.items()), highlight=False, soft_wrap=True)
    blocks, lines = blocks_of(results), last_lines(results, foreign)
    show(blocks, lines, wide)
    wide.print(f"took {time.monotonic() - began_s:.0f} s", highlight=False)
    if json_file:
        goals = [{"goal": goal.text, "met": goal.is_met, "figure": goal.figure} for goal in goals_of(results)]
        json_file.write_text(
            json.dumps({"machine": facts, "goals": goals, "others": foreign} | results, indent=1) + "\n"
        )
    if markdown_file:
        markdown_file.write_text(markdown(blocks, lines, heading="Goals"))


if __name__ == "__main__":
    typer.run(main)
