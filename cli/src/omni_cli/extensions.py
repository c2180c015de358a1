"""Commands that other packages bring: entry points of the group `omni_cli.commands`, name -> Typer app.

An app is imported when its command is run or its help is asked for; `omni --help` shows the summary of the package that
brings it. Its context's `obj` is a `Services`: how to find a service of a running stack.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from omni_cli.errors import InvalidOptions, NoSuchStack
from omni_cli.options import chosen, files_of
from omni_cli.probes import reachable

GROUP = "omni_cli.commands"
LINE_BREAK = re.compile(r"(?<!\n)\n(?!\n)")
PACKAGES: Mapping[str, str] = {
    "attention": "omni-kernels[cli]",
    "kernels": "omni-kernels[cli]",
    "placement": "omni-placement[cli]",
    "quantize": "omni-kernels[cli]",
}
"""What to install for a command of ours that is not there."""
SUMMARIES: Mapping[str, str] = {
    "attention": "Sparse attention: search for patterns over layers, look at them, evaluate them.",
    "kernels": "The operators: how every backend conforms, which ones run, the contract with Ascend.",
    "placement": "Expert layouts: plan, compare, look at them, and put them in force.",
    "quantize": "Write a copy of a model with int8 weights.",
}
"""Of commands of ours, where the summary of their package says less."""


class Services:
    """Where the services of the stacks on this machine listen."""

    def address_of(self, service: str, *, name: str | None, port: int | None, home: Path | None) -> str:
        """host:port of a service of the stack meant by name or port, or of the only one.

        Raises:
            NoSuchStack: none is meant, or it has no such service.
        """
        stack = chosen(files_of(home), name, port)
        for process in stack.processes:
            if process.service == service:
                return reachable(process.address)
        raise NoSuchStack(f"stack {stack.name!r} has no {service}")

    def metrics_of(
        self, services: Sequence[str], *, name: str | None, port: int | None, home: Path | None
    ) -> dict[str, str]:
        """Process name -> URL of its metrics, of these services of the stack meant; empty where there is no stack.

        Raises:
            NoSuchStack: one is named that is not there, or there are several.
        """
        files = files_of(home)
        if name is None and port is None and not any(files.all()):
            return {}
        stack = chosen(files, name, port)
        return {
            process.name: f"http://127.0.0.1:{process.metrics_port}/metrics"
            for process in stack.processes
            if process.service in services and process.metrics_port
        }


class _Extension(TyperCommand):
    """Stands for a command until it is needed."""

    def __init__(self, entry: EntryPoint) -> None:
        summary = entry.dist.metadata["Summary"] if entry.dist is not None else ""
        super().__init__(entry.name, help=SUMMARIES.get(entry.name) or summary or f"From {entry.value}.")
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        try:
            app = self._entry.load()
        except ModuleNotFoundError as error:
            raise InvalidOptions(f"omni {self.name} cannot be loaded ({error}); {_how(self._entry.name)}") from error
        command = typer.main.get_command(app)
        command.name = self.name
        unwrap(command)
        return command.make_context(info_name, args, parent, obj=Services(), **extra)


class _Missing(TyperCommand):
    """A command of ours whose package is not installed."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        raise InvalidOptions(f"omni {self.name} is not installed; {_how(str(self.name))}")


class Commands(TyperGroup):
    """The command's own, and those of extensions; a name of its own is never replaced."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        unwrap(self)

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return own + [name for name in sorted({entry.name for entry in _installed()}) if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        if entry := next(iter(_installed(cmd_name)), None):
            return _Extension(entry)
        return _Missing(cmd_name) if cmd_name in PACKAGES else None


def unwrap(command: Any) -> None:
    """Paragraphs of help without the line breaks of the source, at which typer would break them too."""
    if command.help:
        command.help = LINE_BREAK.sub(" ", inspect.cleandoc(command.help))
    for inner in getattr(command, "commands", {}).values():
        unwrap(inner)


def _installed(name: str | None = None) -> Iterable[EntryPoint]:
    return entry_points(group=GROUP) if name is None else entry_points(group=GROUP, name=name)


def _how(name: str) -> str:
    package = PACKAGES.get(name)
    return f"install it: pip install {package!r}" if package else "see the package that brings it"
