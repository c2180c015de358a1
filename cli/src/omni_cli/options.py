"""Options that several commands share, and what they mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from omni_cli.errors import InvalidOptions, NoSuchStack
from omni_cli.machine import find_root
from omni_cli.state import StackState, StateFiles
from omni_common import addresses

Home = Annotated[
    Path | None,
    typer.Option(envvar="OMNI_CLI_HOME", help="Where state and logs lie.", show_default="<checkout>/.omni"),
]
Name = Annotated[str | None, typer.Option(help="The stack's name.", show_default="p<port>, or the only stack")]
Port = Annotated[int | None, typer.Option(help="The stack by its port.")]
Url = Annotated[str | None, typer.Option(help="A proxy: http(s)://host:port.", show_default="the running stack's")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def files_of(home: Path | None) -> StateFiles:
    return StateFiles((home or find_root(Path.cwd()) / ".omni").resolve())


def chosen(files: StateFiles, name: str | None, port: int | None) -> StackState:
    """The stack meant by --name or --port, or the only one there is."""
    if name is not None:
        return files.load(name)
    states = list(files.all())
    known = ", ".join(state.name for state in states)
    if not states:
        raise NoSuchStack("no stack is recorded; start one with omni up")
    if port is not None:
        states = [state for state in states if state.url.endswith(f":{port}")]
        if not states:
            raise NoSuchStack(f"no stack on port {port} (known: {known})")
    if len(states) == 1:
        return states[0]
    raise NoSuchStack(f"say which stack with --name or --port (known: {known})")


def proxy_url(url: str | None, home: Path | None, name: str | None, port: int | None) -> str:
    return url or chosen(files_of(home), name, port).url


def logged(files: StateFiles, name: str | None, port: int | None) -> str:
    """The stack whose logs are meant: logs stay when it stops, so it need not be recorded."""
    known = files.logged()
    if name is None and (port is not None or any(files.all())):
        return chosen(files, None, port).name
    if name is None and len(known) == 1:
        return known[0]
    if name in known:
        return str(name)
    if not known:
        raise NoSuchStack("no stack has left logs here; start one with omni up")
    asked = "say whose logs with --name" if name is None else f"no logs of a stack {name!r}"
    raise NoSuchStack(f"{asked} (there are: {', '.join(known)})")


def adapter_folders(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER as name -> folder. Raises InvalidOptions."""
    folders: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder):
            raise InvalidOptions(f"--adapter {each!r}: write NAME=FOLDER, as in sql=adapters/sql")
        if name in folders:
            raise InvalidOptions(f"--adapter {name!r} is given twice")
        folders[name] = Path(folder).expanduser().resolve()
    return folders


def checked_address(option: str, given: str) -> str:
    """Raises InvalidOptions where it is not host:port."""
    try:
        return addresses.checked_address(given)
    except ValueError as error:
        raise InvalidOptions(f"{option} {error}") from None
