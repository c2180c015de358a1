"""`omni kernels lint` and `omni kernels contract`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from omni_kernels.contract.report import ContractResult, contract_rows, lint_tree, texts, trial
from omni_kernels.contract.wheels import NoWheel
from omni_kernels.contract.wrong_calls import Refusal, WrongCall, draw, refusal

SEED, WRONG_CALLS = 6, 100


def lint(as_json: bool) -> None:
    """Check every torch_npu call in the tree against the schemas of the pinned torch-npu releases."""
    try:
        folders = texts()
    except NoWheel as error:
        raise _failed(error) from error
    report = lint_tree(folders)
    if as_json:
        print(json.dumps([{**asdict(finding), "file": str(finding.file)} for finding in report.findings], indent=2))
    else:
        for finding in report.findings:
            print(finding)
        print(f"{len(report.sites)} calls against torch-npu {', '.join(folders)}: {len(report.findings)} findings")
    raise typer.Exit(bool(report.findings))


def contract(as_json: bool) -> None:
    """Run every npu kernel against the pinned torch-npu releases, and 100 wrong calls against the validators."""
    try:
        rows = contract_rows()
    except NoWheel as error:
        raise _failed(error) from error
    refusals = [(call, refusal(call)) for call in draw(SEED, WRONG_CALLS)]
    unchecked = trial({"texts": str(list(texts().values())[-1]), "wrong_calls": (SEED, WRONG_CALLS)})["wrong_calls"]
    if as_json:
        wrong = [
            {"call": str(call), **asdict(refused), "passes_without_validator": unchecked.get(str(call))}
            for call, refused in refusals
        ]
        print(json.dumps({"ops": {name: asdict(row) for name, row in rows.items()}, "wrong_calls": wrong}, indent=2))
    else:
        Console().print(_table(rows))
        _tell_wrong_calls(refusals, unchecked)
    all_refused = all(refused.gate for _, refused in refusals)
    raise typer.Exit(not (all_refused and all(row.ok for row in rows.values())))


def _tell_wrong_calls(refusals: Sequence[tuple[WrongCall, Refusal]], unchecked: Mapping[str, bool]) -> None:
    gates = Counter(refused.gate for _, refused in refusals if refused.gate)
    by_gate = ", ".join(f"{count} by {gate}" for gate, count in sorted(gates.items()))
    print(f"wrong calls, seed {SEED}: {gates.total()} of {len(refusals)} refused ({by_gate})")
    guarded = [
        unchecked[str(call)] for call, refused in refusals if refused.gate == "validator" and str(call) in unchecked
    ]
    print(f"of {len(guarded)} to npu kernels by validator, {sum(guarded)} would pass the meta kernels alone")
    for call, refused in refusals:
        if not refused.gate:
            print(f"  not refused: {call}")


def _table(rows: dict[str, ContractResult]) -> Table:
    columns = ("op", "torch_npu calls", "cases", "unsupported", "lint", "meta", "twin", "notes")
    table = Table(*columns, box=None, header_style="bold")
    for name, row in rows.items():
        calls = ", ".join(call.removeprefix("npu_") for call in row.calls)
        counts = (str(row.cases), str(row.unsupported))
        table.add_row(name, calls, *counts, row.lint, row.meta, row.twin, "; ".join(row.notes))
    return table


def _failed(error: NoWheel) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
