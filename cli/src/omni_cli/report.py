"""Tables for people."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from omni_cli.doctor import Check, Verdict
from omni_cli.progress import STYLES
from omni_cli.status import Condition, StackStatus

VERDICT_STYLES: Mapping[Verdict, str] = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
CONDITION_STYLES: Mapping[Condition, str] = {
    Condition.HEALTHY: "green",
    Condition.DEGRADED: "yellow",
    Condition.NOT_HEALTHY: "bold red",
}


def borderless(headings: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def show_stacks(stacks: Sequence[StackStatus], console: Console) -> None:
    """One table per stack and one line on its fleet."""
    if not stacks:
        console.print("no stack is recorded; start one with [bold]omni up[/]")
    for stack in stacks:
        style = CONDITION_STYLES[stack.condition]
        console.print(
            f"[bold]{stack.name}[/] {stack.url} [{style}]{stack.condition}[/]", highlight=False, soft_wrap=True
        )
        table = borderless(("service", "state", "pid", "address", "cores", "metrics"))
        for service in stack.services:
            state = Text(service.phase, STYLES[service.phase])
            table.add_row(
                service.name, state, str(service.pid), service.address, service.cores or "", service.metrics or ""
            )
        console.print(table)
        for service in stack.services:
            if service.detail:
                console.print(f"{service.name}: {escape(service.detail)}", highlight=False, soft_wrap=True)
        seen = "cannot be asked" if stack.workers is None else f"{len(stack.workers)} of {stack.expected_workers}"
        console.print(f"workers the proxy sees: {seen}", highlight=False)
        for worker in stack.idled:
            line = f"worker {worker['id']} takes no work: {worker['refusal']}"
            console.print(escape(line), highlight=False, soft_wrap=True)
        for unmet in stack.unreachable:
            line = f"worker at {unmet['address']}: {unmet['state']}"
            console.print(escape(line), highlight=False, soft_wrap=True)
        console.print()


def show_checks(checks: Mapping[str, Check], console: Console) -> None:
    """One line per check, and under it how to mend it."""
    for name, check in checks.items():
        mark = Text(f"{check.verdict:<5}", VERDICT_STYLES[check.verdict])
        console.print(mark, f"{name:<13}", escape(check.detail), highlight=False, soft_wrap=True)
        if check.mend:
            console.print(f"{'':<20}[dim]{escape(check.mend)}[/]", highlight=False, soft_wrap=True)
