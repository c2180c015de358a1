"""Showing a stack come up: a live table on a terminal, one line per change elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from omni_cli.probes import Phase

STYLES: Mapping[Phase, str] = {
    Phase.STARTING: "dim",
    Phase.LOADING: "yellow",
    Phase.READY: "green",
    Phase.DEAD: "bold red",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One service while it comes up; `seconds` since it was started, until it was ready."""

    name: str
    phase: Phase
    seconds: float
    address: str
    cores: str | None = None


class Progress(Protocol):
    """Shown from entering to leaving the context."""

    def update(self, rows: Sequence[Row]) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LiveProgress:
    """A table drawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8)
        self._spinner = Spinner("dots", style="yellow")

    def update(self, rows: Sequence[Row]) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("", "service", "state", "address", "cores"):
            table.add_column(heading)
        table.add_column("time", justify="right")
        for row in rows:
            is_busy = row.phase in (Phase.STARTING, Phase.LOADING)
            mark = self._spinner if is_busy else Text("✓" if row.phase is Phase.READY else "✗", STYLES[row.phase])
            state = Text(row.phase, STYLES[row.phase])
            table.add_row(mark, row.name, state, row.address, row.cores or "", f"{row.seconds:.0f} s")
        self._live.update(table)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


class LineProgress:
    """One line per change of a service's phase; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, Phase] = {}

    def update(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._shown.get(row.name) is not row.phase:
                self._shown[row.name] = row.phase
                self._console.print(
                    f"{row.name}: {row.phase} ({row.seconds:.1f} s) {row.address}", highlight=False, soft_wrap=True
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def progress_on(console: Console) -> Progress:
    """The form that suits where the output goes."""
    return LiveProgress(console) if console.is_terminal else LineProgress(console)
