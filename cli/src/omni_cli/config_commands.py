"""`omni config`: the scheduler's configuration, before and while it is in force."""

import asyncio
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from omni_cli.errors import CliError, InvalidOptions
from omni_cli.kv import ProxyPages
from omni_cli.options import Home, Name, Port, Url, proxy_url
from omni_common.command import examples

CHECKER = "omni_proxy.schedule_config"

config_app = typer.Typer(help="The scheduler's configuration: policy, queue, tenants.", no_args_is_help=True)


class InvalidConfig(CliError):
    """The proxy would refuse the file."""

    exit_code = 3


@config_app.command(
    epilog=examples(
        "omni config check scheduler.yaml",
        "omni config check scheduler.yaml --quiet",
        exit_codes="0 the file is valid, 3 it is not: every mistake is named with its place",
    )
)
def check(
    file: Annotated[Path, typer.Argument(help="A file for OMNI_PROXY_SCHEDULER_CONFIG.", show_default=False)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the exit code, and mistakes.")] = False,
) -> None:
    """Check a file as the proxy would, and print the values that would hold, defaults too. Keys are not shown.

    Environment variables that hold keys may be missing here: each is noted, and must be set where the proxy runs.
    """
    if find_spec(CHECKER.partition(".")[0]) is None:
        raise InvalidOptions("omni-proxy is not installed beside the command line")
    # The command line imports no service; the proxy's own module says what is valid.
    done = subprocess.run([sys.executable, "-m", CHECKER, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InvalidConfig(done.stderr.strip())
    if not quiet:
        print(done.stderr, end="", file=sys.stderr)
        print(done.stdout, end="")


@config_app.command(epilog=examples("omni config show", "omni config show --url http://proxy:8000"))
def show(
    url: Url = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
) -> None:
    """The values a proxy has in force. Keys are not shown."""
    pages = ProxyPages(proxy_url(url, home, name, port))
    print(json.dumps(asyncio.run(pages.config()), indent=2))
