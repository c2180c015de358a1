"""Measure the proxy alone: a real process on one core, before simulated workers and a client on cores of their own.

    python bench/proxy.py --quick
    python bench/proxy.py --repeats 5 --profile --json proxy.json --markdown proxy.md
    python bench/proxy.py --only latency

Tokens are detokenized and checked against two stop strings on their way; no model is involved.
"""

import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from proxyload.processes import Broken, cores_of
from proxyload.report import as_json, markdown, show
from proxyload.runs import Bench, Wishes
from rich.console import Console
from sidebyside.machine import machine

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("load", "latency", "gaps")
QUICK_SECTIONS = ("load", "latency")
STREAMS = "1,8,64,256,512,1000"
QUICK_STREAMS = "1,64,512"
PACKAGES = ("grpcio", "protobuf", "uvloop", "uvicorn", "httptools", "fastapi", "orjson", "omni-proxy")


def main(
    quick: Annotated[bool, typer.Option(help="One round of short windows, under a minute")] = False,
    only: Annotated[str, typer.Option(help=f"Sections: {', '.join(SECTIONS)}")] = "",
    streams: Annotated[str, typer.Option(help="Concurrent streams of the saturation rows")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; figures are medians over them")] = 3,
    measure_s: Annotated[float, typer.Option(min=0.5, help="Seconds of one window")] = 3.0,
    max_tokens: Annotated[int, typer.Option(min=64, help="Tokens of an answer")] = 256,
    cores: Annotated[str, typer.Option(help="Cores of proxy,worker,client; default the last three allowed")] = "",
    profile: Annotated[bool, typer.Option(help="Also run the proxy under cProfile at 64 streams")] = False,
    model: Annotated[Path, typer.Option(help="Model directory, for its tokenizer")] = ROOT / "models" / "tiny-moe",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here")] = None,
) -> None:
    """Measure the proxy alone on one core."""
    console = Console(stderr=True, log_path=False, width=140)
    sections = only.split(",") if only else list(QUICK_SECTIONS if quick else SECTIONS)
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise typer.BadParameter(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended on the way out
    facts = machine(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as logs:
        wishes = Wishes(
            streams=tuple(map(int, (streams or (QUICK_STREAMS if quick else STREAMS)).split(","))),
            repeats=1 if quick else repeats,
            warm_s=1.0,
            measure_s=1.0 if quick else measure_s,
            max_tokens=max_tokens,
            short_tokens=16,
            model_dir=model.resolve(),
            cores=cores_of(cores),
            logs=Path(logs),
            log=lambda line: console.log(line, highlight=False),
        )
        bench = Bench(wishes)
        try:
            for section in sections:
                {"load": bench.load, "latency": bench.latency, "gaps": bench.gaps}[section]()
            if profile:
                bench.profile()
        except Broken as error:
            console.print(f"[red]failed:[/red] {error}", highlight=False)
            raise typer.Exit(1) from None
    show(bench.results, wishes, Console(width=max(console.width, 150)))
    if json_file:
        json_file.write_text(json.dumps({"machine": facts} | as_json(bench.results), indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(bench.results, wishes))


if __name__ == "__main__":
    typer.run(main)
