"""`omni attention`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from omni_kernels.patterns import pattern as files
from omni_kernels.patterns import plot, questions
from omni_kernels.patterns.pattern import Budget, Found, Layer, Pattern
from omni_kernels.patterns.search import METHODS, Candidate, Goal, Score, Search, Space

EXAMPLE_SEARCH = """Examples:
  omni attention search --model models/tiny-moe --questions questions.jsonl --kv-share 0.3 --out pattern.json
  omni attention search --model models/tiny-moe --questions questions.jsonl --accuracy-loss 0.02 --out pattern.json

A line of questions: {"prompt": "...", "answer": "...", "expect": ["..."]}"""
EXAMPLE_EVALUATE = """Examples:
  omni attention evaluate pattern.json --model models/tiny-moe --questions questions.jsonl
  omni attention evaluate pattern.json --model models/tiny-moe --questions questions.jsonl --json"""
EXAMPLE_SHOW = """Examples:
  omni attention show pattern.json
  omni attention show pattern.json --context 32768 --json"""

app = typer.Typer(
    help="Patterns of sparse attention: search, look at, evaluate.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[Path, typer.Option(help="Model folder.", exists=True, file_okay=False)]
Questions = Annotated[
    Path, typer.Option("--questions", exists=True, dir_okay=False, help="Held-out questions, JSON lines.")
]
PatternFile = Annotated[
    Path, typer.Argument(metavar="PATTERN", exists=True, dir_okay=False, help="Pattern file of omni attention search.")
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads; part of what must be the same to get the same file.")]


@app.callback()
def main() -> None:
    """While decoding, chosen layers keep the first and last KV blocks of a sequence only."""


@app.command(epilog=EXAMPLE_SEARCH)
def search(
    model: Model,
    questions_file: Questions,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Pattern file to write, for omni up --attention-pattern.")],
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "genetic",
    seed: Annotated[int, typer.Option(help="The same seed finds the same pattern.")] = 0,
    kv_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Most KV bytes, as a part of full attention's.")
    ] = None,
    accuracy_loss: Annotated[
        float | None, typer.Option(min=0, max=1, help="Instead: fewest bytes that lose no more accuracy than this.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the sequence whose KV bytes count.")] = 4096,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block; engines run with the same.")] = 128,
    sinks: Annotated[str, typer.Option(help="Sink blocks a layer may have.")] = "0,1",
    recents: Annotated[str, typer.Option(help="Recent blocks a layer may have.")] = "1,2,3,4",
    plot_file: Annotated[
        Path | None, typer.Option("--plot", dir_okay=False, help="Accuracy against KV bytes, as a PNG.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Find a pattern: most accuracy within a share of the KV bytes, or fewest bytes within a loss of accuracy."""
    if method not in METHODS:
        raise typer.BadParameter(f"{method!r} is none of {', '.join(METHODS)}", param_hint="--method")
    if (kv_share is None) == (accuracy_loss is None):
        raise typer.BadParameter("give either --kv-share or --accuracy-loss")
    for option, file in (("--out", out), ("--plot", plot_file)):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"no folder {file.parent}; make it first", param_hint=option)
    if plot_file:
        _needs("matplotlib")
    with _refusing("--sinks, --recents"):
        budgets = choices(sinks, recents)
    decoder = _decoder(model, questions_file, block_size, threads)
    full = Pattern(model.name, block_size, decoder.token_bytes, (None,) * decoder.num_layers)
    space = Space(full, budgets, context)
    best_possible = decoder.score(full.layers)
    floor = None if accuracy_loss is None else best_possible.accuracy - accuracy_loss
    with _refusing("--kv-share"):
        run = Search(space, Goal(kv_share, floor), decoder.score, _say)
        chosen = METHODS[method](run, seed)
    found = _found(method, seed, run, chosen, best_possible, len(questions.read(questions_file)))
    with _refusing("--out"):
        files.write(Pattern(full.model, block_size, full.token_bytes, chosen, found), out)
    if plot_file:
        with _refusing("--plot"):
            plot.draw({method: run.seen}, space, f"{model.name}, seed {seed}", plot_file)
    typer.echo(f"{out}: {_described(files.read(out), context)}")


@app.command(epilog=EXAMPLE_EVALUATE)
def evaluate(
    pattern_file: PatternFile,
    model: Model,
    questions_file: Questions,
    threads: Threads = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Accuracy and perplexity under a pattern, beside full attention's."""
    with _refusing("PATTERN"):
        pattern = files.read(pattern_file)
    decoder = _decoder(model, questions_file, pattern.block_size, threads)
    if decoder.num_layers != len(pattern.layers):
        said = f"{pattern_file} has {len(pattern.layers)} layers, the model {decoder.num_layers}; search one for it"
        raise typer.BadParameter(said, param_hint="PATTERN")
    scores = {"pattern": decoder.score(pattern.layers), "full": decoder.score((None,) * decoder.num_layers)}
    if as_json:
        typer.echo(json.dumps({name: asdict(score) for name, score in scores.items()}))
        return
    for name, score in scores.items():
        typer.echo(f"{name:8} accuracy {score.accuracy:.3f}  perplexity {score.perplexity:.4f}")


@app.command(epilog=EXAMPLE_SHOW)
def show(
    pattern_file: PatternFile,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the sequence whose KV bytes count.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a pattern keeps, what that is in bytes, and how it was found."""
    with _refusing("PATTERN"):
        pattern = files.read(pattern_file)
    if as_json:
        sizes = {"context": context, "kv_bytes": pattern.kv_bytes(context), "share": pattern.share(context)}
        typer.echo(json.dumps(pattern.to_json() | sizes))
        return
    typer.echo(_described(pattern, context))
    for n, layer in enumerate(pattern.layers):
        kept = "everything" if layer is None else f"{layer.sink_blocks} first and {layer.recent_blocks} last blocks"
        typer.echo(f"  layer {n:3}  {kept}")


def choices(sinks: str, recents: str) -> tuple[Layer, ...]:
    """Full attention, and every pair of '0,1' sink blocks and '1,2' recent blocks. Raises ValueError for others."""
    pairs = [Budget(int(sink), int(recent)) for sink in sinks.split(",") for recent in recents.split(",")]
    return (None, *pairs)


def _decoder(model: Path, questions_file: Path, block_size: int, threads: int) -> Any:
    with _refusing("--questions"):
        asked = questions.read(questions_file)
    _needs("torch", "transformers", "safetensors")
    import torch

    from omni_kernels.patterns.decoding import Decoder

    torch.set_num_threads(threads)
    with _refusing():
        return Decoder(model, asked, block_size)


def _needs(*names: str) -> None:
    if missing := [name for name in names if find_spec(name) is None]:
        raise typer.BadParameter(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _refusing(option: str | None = None) -> Iterator[None]:
    """What the block refuses, as a wrong value of this option; None where the message names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _found(method: str, seed: int, run: Search, chosen: Candidate, full: Score, asked: int) -> Found:
    score = run.seen[chosen]
    return Found(method, seed, len(run.seen), asked, score.accuracy, score.perplexity, full.accuracy, full.perplexity)


def _say(count: int, candidate: Candidate, share: float, score: Score) -> None:
    layers = " ".join("full" if layer is None else str(layer) for layer in candidate)
    line = f"{count:4}  KV {share:6.1%}  accuracy {score.accuracy:.3f}  perplexity {score.perplexity:8.4f}  {layers}"
    typer.echo(line, err=True)


def _described(pattern: Pattern, context: int) -> str:
    found = pattern.found
    text = (
        f"{pattern.model}, blocks of {pattern.block_size} tokens: {pattern}; at {context} tokens "
        f"{pattern.kv_bytes(context):,} KV bytes a sequence, {pattern.share(context):.1%} of full attention's"
    )
    if found.accuracy is None or found.full_accuracy is None:
        return text
    return (
        f"{text}; accuracy {found.accuracy:.3f} (full {found.full_accuracy:.3f}) on {found.questions} questions, "
        f"found by {found.method}, seed {found.seed}, {found.evaluations} patterns scored"
    )
