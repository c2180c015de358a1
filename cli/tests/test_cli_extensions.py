"""Commands of other packages: loaded when needed, named when missing, and the services of a stack found for them."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from omni_cli import extensions
from omni_cli.errors import InvalidOptions, NoSuchStack
from omni_cli.extensions import GROUP, Services
from omni_cli.main import app
from omni_cli.state import ProcessRecord, StackState, StateFiles

example = typer.Typer()


@example.command("hello")
def hello(context: typer.Context, name: str = "you") -> None:
    """Say hello."""
    print(f"hello {name}, {type(context.obj).__name__}")


@example.command("bye")
def bye() -> None:
    """Say bye."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(**entries: str) -> None:
        known = [EntryPoint(name, value, GROUP) for name, value in entries.items()]

        def found(group: str, name: str | None = None) -> list[EntryPoint]:
            return [entry for entry in known if group == GROUP and name in (None, entry.name)]

        monkeypatch.setattr(extensions, "entry_points", found)

    return install


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_an_extension_is_a_command(installed: Callable[..., None]) -> None:
    installed(example=f"{__name__}:example")
    assert "example" in run("--help").output
    result = run("example", "hello", "--name", "all")
    assert result.output == "hello all, Services\n", result.exception
    assert "Say bye." in run("example", "--help").output


def test_a_command_of_our_own_is_never_replaced(installed: Callable[..., None]) -> None:
    installed(version="no.such.module:app")
    assert run("version").exit_code == 0


def test_a_missing_package_is_named(installed: Callable[..., None]) -> None:
    installed()
    error = run("placement", "plan").exception
    assert isinstance(error, InvalidOptions) and "pip install 'omni-placement[cli]'" in str(error)
    assert "│ placement" not in run("--help").output
    assert "No such command" in run("nonsense").output


def test_a_package_that_cannot_be_imported_is_named(installed: Callable[..., None]) -> None:
    installed(placement="no.such.module:app", other="no.such.module:app")
    assert "pip install 'omni-placement[cli]'" in str(run("placement").exception)
    assert "no.such.module" in str(run("other").exception) or "No module named 'no'" in str(run("other").exception)


def test_help_imports_no_extension() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom omni_cli.main import app\n"
        "shown = CliRunner().invoke(app, ['--help'])\nassert shown.exit_code == 0 and 'placement' in shown.output\n"
        "print({'omni_placement', 'numba', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param(("plan", "gone.npy", "--ranks", "4"), 2, "gone.npy", id="refused"),
        pytest.param(("show", "--placement", "127.0.0.1:1"), 1, "does not answer", id="away"),
        pytest.param(("show", "--home", "nowhere"), 4, "no stack is recorded", id="no stack"),
    ],
)
def test_errors_of_extensions_are_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    command = [sys.executable, "-m", "omni_cli.main", "placement", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == code and done.stderr.startswith("error: ") and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_services_of_a_stack_are_found(tmp_path: Path) -> None:
    record = ProcessRecord("placement", 1, 0.0, service="placement", address="0.0.0.0:50062")
    StateFiles(tmp_path).save(StackState("p1", "http://127.0.0.1:1", 2, (record,)))
    services = Services()
    assert services.address_of("placement", name=None, port=None, home=tmp_path) == "127.0.0.1:50062"
    with pytest.raises(NoSuchStack, match="has no kvstore"):
        services.address_of("kvstore", name="p1", port=None, home=tmp_path)
