"""`omni workers`: the fleet as the proxy sees it, and commands to single workers."""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from omni_cli.options import Home, Name, Port, Url, proxy_url
from omni_cli.report import borderless
from omni_cli.workers import ROLES, SeenWorker, WorkersClient, seen_workers, unmet_workers, weights_apart
from omni_common.command import examples

EXIT_NOT_EMPTY = 3
PIPE_WIDTH = 200
LOAD = ("worker", "role", "group", "running", "waiting", "queued", "KV", "in flight", "saturation")
MOST_ADAPTERS = 4
"""Named in a row; of more, how many."""

workers_app = typer.Typer()

WorkerId = Annotated[str, typer.Argument(help="As `omni workers` shows it.", show_default=False)]


@workers_app.callback(
    invoke_without_command=True, epilog=examples("omni workers", "omni workers --url http://proxy:8000 --json")
)
def show(
    context: typer.Context,
    url: Url = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="The proxy's page, for programs.")] = False,
) -> None:
    """The workers: role, group, load, what this proxy has in flight there, and why one takes no work.

    `queued` counts prompt tokens to be computed; `load` is the worker's own account, `in flight` the proxy's. Of LoRA
    adapters, [bold]*[/] marks those in the engine's slots.
    A worker of the proxy's settings that has not answered yet is shown by its address, with the reason.
    """
    if context.invoked_subcommand is not None:
        return
    page = asyncio.run(WorkersClient(proxy_url(url, home, name, port)).page())
    if as_json:
        print(json.dumps(page, indent=2))
    else:
        _show(page)


def _show(page: Mapping[str, Any]) -> None:
    workers, unmet = seen_workers(page), unmet_workers(page)
    has_adapters = any(worker.adapters for worker in workers)
    headings = (*LOAD, *(("adapters",) if has_adapters else ()), "")
    table = borderless(headings)
    for worker in workers:
        adapters = (_adapters(worker),) if has_adapters else ()
        table.add_row(*_load(worker), *adapters, worker.refusal or "")
    for one in unmet:
        table.add_row(escape(one.address), *[""] * (len(headings) - 2), escape(one.refusal))
    # Names are not cut short in a pipe.
    console = Console(width=None if Console().is_terminal else PIPE_WIDTH)
    console.print(table, highlight=False)
    for one in unmet:
        console.print(escape(f"{one.address}: {one.state}"), highlight=False, soft_wrap=True)
    for name, alike in weights_apart(workers).items():
        groups = " | ".join(", ".join(ids) for ids in alike)
        told = f"{name}: no KV blocks go between workers of different weights: {groups}"
        console.print(escape(told), highlight=False, soft_wrap=True)


def _load(worker: SeenWorker) -> tuple[str, ...]:
    return (
        worker.worker_id,
        worker.role,
        worker.group,
        str(worker.running),
        str(worker.waiting),
        str(worker.queued_tokens),
        f"{worker.kv_usage:.0%}",
        str(worker.in_flight),
        "" if worker.saturation is None else f"{worker.saturation:.2f}",
    )


def _adapters(worker: SeenWorker) -> str:
    names = [f"{name}*" if in_slot else name for name, in_slot in worker.adapters.items()]
    more = len(names) - MOST_ADAPTERS
    return escape(", ".join([*names[:MOST_ADAPTERS], *([f"{more} more"] if more > 0 else ())]))


@workers_app.command(
    epilog=examples("omni workers role p8000-decode-1 prefill", "omni workers role p8000-prefill-0 both")
)
def role(
    worker_id: WorkerId,
    new: Annotated[str, typer.Argument(metavar="ROLE", help=", ".join(ROLES), show_default=False)],
    url: Url = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
) -> None:
    """Change what a worker does. What runs on it goes on; a restart brings back the role of its settings.

    A worker on vLLM refuses unless its engine was started for both legs (OMNI_<SERVICE>_VLLM__ANY_ROLE=true).
    """
    previous = asyncio.run(WorkersClient(proxy_url(url, home, name, port)).set_role(worker_id, new))
    print(f"{worker_id}: {previous} -> {new}" if previous != new else f"{worker_id} is {new} already")


@workers_app.command(
    epilog=examples(
        "omni workers drain p8000-decode-1",
        "omni workers drain p8000-decode-1 --resume",
        exit_codes="0 nothing is left on it, 3 something is",
    )
)
def drain(
    worker_id: WorkerId,
    resume: Annotated[bool, typer.Option("--resume", help="Take work again instead.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.5, help="How long to wait until it is empty.")] = 60.0,
    url: Url = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
) -> None:
    """Give a worker no new work and wait until its sequences have ended and its blocks have been pulled.

    It stays so until --resume or a restart.
    """
    left = asyncio.run(WorkersClient(proxy_url(url, home, name, port)).drain(worker_id, timeout_s, resume=resume))
    if resume:
        print(f"{worker_id} takes work")
    elif left.is_empty:
        print(f"{worker_id} is empty")
    else:
        print(f"{worker_id} takes no new work; left: {left.running} running, {left.leases} prompts not pulled")
        raise typer.Exit(EXIT_NOT_EMPTY)
