"""Options that several commands share, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.errors import NoSuchStack
from omni_cli.machine import find_root
from omni_cli.state import StackState, StateFiles

Home = Annotated[
    Path | None,
    typer.Option(envvar="OMNI_CLI_HOME", help="Where state and logs lie.", show_default="<checkout>/.omni"),
]
Name = Annotated[str | None, typer.Option(help="The stack's name.", show_default="p<port>, or the only stack")]
Port = Annotated[int | None, typer.Option(help="The stack by its port.")]
Url = Annotated[str | None, typer.Option(help="A proxy.", show_default="the running stack's")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def examples(*lines: str, exit_codes: str = "") -> str:
    head = f"Exit code: {exit_codes}.\n\n" if exit_codes else ""
    return head + "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)


def files_of(home: Path | None) -> StateFiles:
    return StateFiles((home or find_root(Path.cwd()) / ".omni").resolve())


def chosen(files: StateFiles, name: str | None, port: int | None) -> StackState:
    """The stack meant by --name or --port, or the only one there is."""
    if name is not None:
        return files.load(name)
    states = list(files.all())
    if port is not None:
        states = [state for state in states if state.url.endswith(f":{port}")]
    if len(states) == 1:
        return states[0]
    known = ", ".join(state.name for state in files.all()) or "none"
    raise NoSuchStack(f"say which stack with --name or --port (known: {known})")
