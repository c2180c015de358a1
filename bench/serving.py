"""Measure Omni beside vLLM's own server on this machine's CPU, in one run.

    python bench/serving.py --quick
    python bench/serving.py --repeats 3 --only a,b,c --json figures.json --markdown figures.md

Every engine gets the same model, settings and core; all else, the load process included, shares one other core.
All systems are started once and alternate in rounds; those whose turn it is not are stopped (SIGSTOP).
"""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from sidebyside.child import Broken
from sidebyside.machine import machine
from sidebyside.measure import Load
from sidebyside.report import as_json, block_of
from sidebyside.run import Wishes, run
from sidebyside.systems import SYSTEMS, EngineSettings, Placement
from sidebyside.tables import markdown, show

ROOT = Path(__file__).resolve().parents[1]
STREAMS = (1, 8, 32)
MIXED_STREAMS = 8
QUICK_SYSTEMS = "a,b,c"


def loads_of(streams: str, warm_s: float, measure_s: float, long_rate: float, long_tokens: int) -> tuple[Load, ...]:
    """One closed-loop load per count of streams, and the mixed one if long prompts arrive at all."""
    loads = [Load(f"{n} streams" if n > 1 else "1 stream", n, warm_s, measure_s) for n in map(int, streams.split(","))]
    if long_rate:
        loads.append(Load("mixed", MIXED_STREAMS, warm_s, 2 * measure_s, long_rate, long_tokens))
    return tuple(loads)


def placement_of(name: str) -> Placement:
    """Refuse an unknown name before anything starts."""
    if name not in get_args(Placement):
        raise typer.BadParameter(f"unknown placement {name}; known: {', '.join(get_args(Placement))}")
    return cast(Placement, name)


def main(
    quick: Annotated[bool, typer.Option(help="One round of short windows on a, b and c")] = False,
    only: Annotated[str, typer.Option(help=f"Systems, in order: {', '.join(SYSTEMS)}")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; figures are medians over them")] = 2,
    streams: Annotated[str, typer.Option(help="Concurrent streams of the closed loops")] = ",".join(map(str, STREAMS)),
    measure_s: Annotated[float, typer.Option(min=1, help="Seconds of one window; the mixed load takes twice")] = 4.0,
    long_rate: Annotated[
        float, typer.Option(min=0, help="Long prompts per second of the mixed load; 0 skips it")
    ] = 1.0,
    long_tokens: Annotated[int, typer.Option(min=1, max=3600, help="Tokens of a long prompt")] = 2500,
    model: Annotated[Path, typer.Option(help="Model directory")] = ROOT / "models" / "tiny-moe",
    compiled: Annotated[bool, typer.Option(help="Compile the model instead of running it eagerly")] = False,
    router: Annotated[Path, typer.Option(help="vllm-router's program")] = ROOT / ".venv-bench" / "bin" / "vllm-router",
    placement: Annotated[str, typer.Option(help="Engine core: together, apart or free")] = "apart",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
) -> None:
    """Measure Omni beside vLLM's own server on this machine's CPU, in one run."""
    console = Console(stderr=True, log_path=False, width=140)
    systems = tuple((only or (QUICK_SYSTEMS if quick else ",".join(SYSTEMS))).split(","))
    if unknown := [key for key in systems if key not in SYSTEMS]:
        raise typer.BadParameter(f"unknown system {', '.join(unknown)}; known: {', '.join(SYSTEMS)}")
    seconds = (0.7, min(measure_s, 2.5)) if quick else (1.0, measure_s)
    loads = loads_of(streams, *seconds, long_rate, long_tokens)
    engine = EngineSettings(model.resolve(), is_eager=not compiled)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended on the way out
    facts = machine()
    try:
        results = run(
            Wishes(systems, loads, 1 if quick else repeats, engine, router, placement_of(placement)),
            lambda line: console.log(line, highlight=False),
        )
    except Broken as error:
        console.print(f"[red]failed:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    block = block_of(results, loads)
    show([block], (), Console(width=max(console.width, 120)))
    if json_file:
        json_file.write_text(json.dumps({"machine": facts} | as_json(results, loads), indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown([block], ()))


if __name__ == "__main__":
    typer.run(main)
