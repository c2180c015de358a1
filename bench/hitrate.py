"""Replay a trace through simulated workers: what routing by our prefix index is worth beside an oracle.

    python bench/hitrate.py --trace mooncake_conversation_trace.jsonl
    python bench/hitrate.py --trace mooncake_conversation_trace.jsonl --quick --json hits.json

Simulated: the workers' caches are those of the simulated engine, time is a stated model, and no device is involved. The
index, its marks and the rule that chooses are the proxy's own.
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from sidebyside.tables import markdown, show
from tracereplay.replay import Scene
from tracereplay.results import Source, as_json, block_of, cases_of, goals, run
from tracereplay.trace import BLOCK_TOKENS, Request, best_hit_rate
from tracereplay.worker import TimeModel

CACHE_BLOCKS = (1000, 2000, 4000, 8000)
QUICK_REQUESTS = 2000


def notes_of(requests: list[Request], scene: Scene, seeds: int) -> list[str]:
    """What the reader must know of the model."""
    times, tokens = scene.times, sum(r.input_tokens for r in requests)
    return [
        f"{len(requests):,} requests, {tokens / 1e6:.1f} million prompt tokens; a single endless cache would hit "
        f"{best_hit_rate(requests):.2%} of them",
        f"simulated: {scene.workers} workers, blocks of {BLOCK_TOKENS} tokens, LRU; prefill takes {times.base_ms:g} ms "
        f"+ {times.ms_per_token:g} ms per uncached token, one prompt at a time; blocks are held "
        f"{times.ms_per_output_token:g} ms per output token. Times are of this model, not of a device",
        f"events are published every {scene.publish_s:g} s and take about {scene.network_s:g} s more; marks outlive "
        f"prefill by {scene.marks_s:g} s; {seeds} seeds, which spread arrivals over the trace's steps of "
        f"{scene.spread_s:g} s and shift the workers' clocks. One different choice changes all that follow, so single "
        "seeds differ by more than most variants do",
        "where there are several proxies, each request comes to one by chance; they share what workers report and the "
        "account of load, but neither marks nor history",
        "all variants choose by the proxy's rule for prefill (least uncached tokens) and see the same account of load; "
        "'own routing history' is given the true size of every cache, which a proxy does not know",
    ]


def main(
    trace: Annotated[Path, typer.Option(help="Trace in Mooncake's format, JSON lines", exists=True, dir_okay=False)],
    quick: Annotated[bool, typer.Option(help=f"{QUICK_REQUESTS} requests, two sizes of cache, two seeds")] = False,
    requests: Annotated[int | None, typer.Option(min=1, help="Only so many of the trace's requests")] = None,
    cache_blocks: Annotated[str, typer.Option(help="Blocks of 512 tokens in each worker's cache")] = "",
    workers: Annotated[int, typer.Option(min=1)] = 8,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default 8, quick 2")] = None,
    speed: Annotated[float, typer.Option(min=0.01, help="Requests arrive so many times as fast")] = 1.0,
    publish_s: Annotated[float, typer.Option(min=0, help="Interval in which a worker publishes events")] = 0.2,
    network_s: Annotated[float, typer.Option(min=0, help="Mean delay from there to the proxy")] = 0.02,
    marks_s: Annotated[float, typer.Option(min=0.001, help="How long a mark outlives its prefill")] = 2.0,
    ms_per_token: Annotated[float, typer.Option(min=0, help="Prefill time per uncached token, of the model")] = 0.15,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = max(1, (os.cpu_count() or 2) // 2),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
) -> None:
    """Replay a trace through simulated workers under several kinds of knowledge."""
    began_s = time.perf_counter()
    source = Source(trace, requests or (QUICK_REQUESTS if quick else None), speed)
    times = TimeModel(ms_per_token=ms_per_token)
    scene = Scene(
        0, workers=workers, publish_s=publish_s, network_s=network_s, marks_s=marks_s, spread_s=3.0 / speed, times=times
    )
    sizes = tuple(map(int, cache_blocks.split(","))) if cache_blocks else CACHE_BLOCKS[1:3] if quick else CACHE_BLOCKS
    count = seeds or (2 if quick else 8)
    results = run(source, cases_of(scene, sizes, None if quick else sizes[len(sizes) // 2]), count, jobs)
    notes = notes_of(source.read(), scene, count)
    block, lines, console = block_of(results), [*goals(results), *notes], Console()
    show([block], lines, Console(width=max(console.width, 130)))
    console.print(f"took {time.perf_counter() - began_s:.0f} s", highlight=False)
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "results": as_json(results)}, indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown([block], lines))


if __name__ == "__main__":
    typer.run(main)
