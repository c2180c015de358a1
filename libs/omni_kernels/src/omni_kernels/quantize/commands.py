"""`omni quantize`. torch is imported when it runs, not before."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from omni_kernels.quantize.verification import Row

WIDTH = 130
NEEDED = ("torch", "safetensors", "compressed_tensors")

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command(no_args_is_help=True)
def quantize(
    model: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="Model folder: config.json and *.safetensors.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the quantized model.", show_default=False)],
    scheme: Annotated[
        str, typer.Option(help="w8a8: int8 weights, a scale per output channel; int8 activations, a scale per token.")
    ] = "w8a8",
    as_json: Annotated[bool, typer.Option("--json", help="The table, for programs.")] = False,
) -> None:
    """Write a model with int8 weights that [bold]omni up --model[/] serves, and check it against the original.

    Quantized matrices take half the bytes of bf16; each is read back and compared. Needs no data and no accelerator:
    activations are quantized as they come. Routers, heads, embeddings, norms, and what latent attention folds
    ([bold]kv_b_proj[/]) stay as they are. Dense, mixture-of-experts and latent-attention models, with prediction layers
    or without.

    Example: [bold]omni quantize models/tiny-moe --out /tmp/tiny-moe-w8a8 && omni up --model /tmp/tiny-moe-w8a8[/]
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(f"needs {', '.join(missing)}: pip install 'omni-kernels[quantize]'")
    try:
        rows = _written(model, out, scheme, show=not as_json)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        print(json.dumps({"out": str(out), "scheme": scheme, "layers": [asdict(row) for row in rows]}, indent=2))
    else:
        _show(rows, out)


def _written(model: Path, out: Path, scheme: str, *, show: bool) -> "list[Row]":
    from omni_kernels.quantize.checkpoint import emptied_on_failure, read_config, weights_of, write
    from omni_kernels.quantize.choice import choose
    from omni_kernels.quantize.verification import verify

    weights = weights_of(model)
    choice = choose(weights, read_config(model), scheme)
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as progress:
        task = progress.add_task("quantizing", total=len(weights))
        write(model, out, choice, lambda name: progress.advance(task))
        progress.update(task, description="checking")
        with emptied_on_failure(out):
            return verify(model, out, choice, scheme)


def _show(rows: "list[Row]", out: Path) -> None:
    table = Table("layer", "scheme", "matrices", "relative error", "worst", "MB before", "MB after", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        errors = (f"{row.mean_error:.2%}", f"{row.worst_error:.2%}") if row.scheme != "kept" else ("-", "-")
        sizes = (f"{row.bytes_before / 1e6:.2f}", f"{row.bytes_after / 1e6:.2f}")
        table.add_row(row.layer, row.scheme, str(row.matrices), *errors, *sizes)
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    console.print(f"{out}: {after / 1e6:.1f} MB, {after / before:.2f} of the {before / 1e6:.1f} MB before. Checked.")
