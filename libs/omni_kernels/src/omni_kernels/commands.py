"""`omni kernels`. torch is imported when a command runs, not before."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table as Lines

from omni_kernels.vllm.status import status

if TYPE_CHECKING:
    from omni_kernels.conformance import Row
    from omni_kernels.contract.report import ContractResult
    from omni_kernels.table import Table

app = typer.Typer(
    help="The operators: how every backend conforms to their meaning, which one runs, the contract with Ascend.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("status", epilog="Examples:\n  omni kernels status\n  omni kernels status --port 8100 --json")(status)

WIDTH = 150
DASHES = ("-", "-", "-")

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command(
    epilog="Examples:\n  omni kernels table --backend cpu --op rms_norm\n  omni kernels table --json table.json"
)
def table(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this: meaning, cpu, triton or npu. May be given again.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op. May be given again.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the table to this file.")
    ] = None,
) -> None:
    """Every op on every backend: cases, error against float64, fake form, refusals, contract; exit code 1 on a failure.

    Error is the largest distance to the op's meaning in float64, and the same in parts of its tolerance. Triton's
    kernels run on a GPU, or else in Triton's interpreter, the small cases first while time lasts. Without an NPU its
    kernels are only checked against the contract: calls linted, shapes by the wheels' meta kernels, numbers by CPU
    twins of torch_npu's ops.
    """
    _needs_torch()
    from omni_kernels.ops import OPS
    from omni_kernels.table import SOURCES, gather

    if json_file and not json_file.parent.is_dir():
        raise typer.BadParameter(f"no folder {json_file.parent}; make it first", param_hint="--json")
    names = _chosen("--op", op, list(OPS))
    with _progress(len(names)) as told:
        found = gather(names, _chosen("--backend", backend, SOURCES), told)
    if json_file:
        try:
            json_file.write_text(json.dumps(asdict(found), indent=2) + "\n")
        except OSError as error:
            raise typer.BadParameter(str(error), param_hint="--json") from None
    _show(found)
    raise typer.Exit(bool(found.failures))


@app.command(epilog="Examples:\n  omni kernels lint\n  omni kernels lint --json | jq length")
def lint(as_json: AsJson = False) -> None:
    """Check every torch_npu call in the tree against the schemas of the pinned torch-npu releases."""
    _needs_torch()
    from omni_kernels.contract import command

    command.lint(as_json)


@app.command(epilog="Examples:\n  omni kernels contract\n  omni kernels contract --json | jq .ops")
def contract(as_json: AsJson = False) -> None:
    """Run every npu kernel against the pinned torch-npu releases: schemas, meta kernels, and numbers on the CPU."""
    _needs_torch()
    from omni_kernels.contract import command

    command.contract(as_json)


def _needs_torch() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        typer.echo(f"error: {error}; install it: pip install 'omni-kernels[torch]'", err=True)
        raise typer.Exit(1) from error


def _chosen(option: str, asked: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise typer.BadParameter(f"no {name!r}; there are {', '.join(known)}", param_hint=option)
    return [name for name in known if not asked or name in asked]


@contextmanager
def _progress(ops: int) -> Iterator[Callable[[str, str], None]]:
    """Says on a terminal what was done last, of each source."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda source, op: None
        return
    seen: dict[str, set[str]] = {}
    last: dict[str, str] = {}
    with console.status("ops") as line:

        def told(source: str, op: str) -> None:
            seen.setdefault(source, set()).add(op)
            last[source] = op
            line.update("; ".join(f"{name} {len(seen[name])}/{ops} {last[name]}" for name in seen))

        yield told


def _show(found: "Table") -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    columns = ("op", "backend", "dtype", "cases", "error", "of tolerance", "fake", "refused", "lint", "meta", "twin")
    lines = Lines(*columns, box=None, header_style="bold", pad_edge=False)
    for column in lines.columns[3:8]:
        column.justify = "right"
    seen: set[str] = set()
    for op in dict.fromkeys([row.op for row in found.rows] + list(found.contract)):
        of_op = [row for row in found.rows if row.op == op]
        for row in of_op:
            name = "" if op in seen else op
            seen.add(op)
            held = found.contract.get(op) if row.backend == "npu" else None
            lines.add_row(name, *_measured(row), *_contract(held))
        if op in found.contract and all(row.backend != "npu" for row in of_op):
            held = found.contract[op]
            lines.add_row("" if op in seen else op, "npu", "all", str(held.cases), *"----", *_contract(held))
    console.print(lines)
    for source, reason in found.absent.items():
        said = ": contract only, see `omni kernels contract`" if source == "npu" and found.contract else " was not run"
        console.print(f"{source}{said} ({reason})", markup=False, soft_wrap=True)
    for problem in found.failures:
        console.print(f"FAILED {problem}", style="red", markup=False, soft_wrap=True)
    cases = sum(row.cases for row in found.rows)
    console.print(f"{cases} cases, {len(found.failures)} failures", markup=False)


def _measured(row: "Row") -> tuple[str, ...]:
    exact = row.share == 0
    return (
        row.backend,
        row.dtype,
        f"{row.cases} of {row.cases + row.left_out}" if row.left_out else str(row.cases),
        ("exact" if row.cases else "-") if exact else f"{row.error:.1e}",
        "-" if exact else f"{row.share:.2f}",
        f"{row.fake}/{row.cases}",
        f"{row.refused}/{row.wrong}",
    )


def _contract(result: "ContractResult | None") -> tuple[str, ...]:
    words = (result.lint, result.meta, result.twin) if result else DASHES
    return tuple(word if word in ("ok", "-") else "FAILED" for word in words)
