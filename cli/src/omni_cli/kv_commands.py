"""`omni kv`: what the prefix index holds, and whether it is right."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from omni_cli.errors import InvalidOptions, NoSuchStack
from omni_cli.kv import KvStoreClient, Member, ProxyPages, Reached, Verdict
from omni_cli.options import AsJson, Home, Name, Port, Url, checked_address, chosen, files_of, proxy_url
from omni_cli.report import borderless
from omni_common.command import examples

EXIT_DIFFERS = 3

kv_app = typer.Typer(
    help="What the prefix index holds: workers, prefixes, and whether it is right.", no_args_is_help=True
)

KvStore = Annotated[str | None, typer.Option(help="host:port of a kvstore.", show_default="the running stack's")]


def _kvstore(address: str | None, home: Path | None, name: str | None, port: int | None) -> KvStoreClient:
    if address is not None:
        return KvStoreClient(checked_address("--kvstore", address))
    stack = chosen(files_of(home), name, port)
    for process in stack.processes:
        if process.service == "kvstore":
            return KvStoreClient(process.address)
    raise NoSuchStack(f"stack {stack.name!r} has no kvstore; name one with --kvstore host:port")


@kv_app.command(epilog=examples("omni kv workers", "omni kv workers --kvstore kv:50061 --json"))
def workers(
    kvstore: KvStore = None, name: Name = None, port: Port = None, home: Home = None, as_json: AsJson = False
) -> None:
    """Members of the cluster: lease, last batch, blocks known, and who owes a snapshot."""
    members, degraded = asyncio.run(_kvstore(kvstore, home, name, port).members())
    if as_json:
        print(json.dumps({"degraded": degraded, "workers": [asdict(member) for member in members]}, indent=2))
        return
    rows = [
        (m.worker_id, m.role, m.model, _share(m), str(m.sequence), f"{m.lease_left_s:.1f} s", _remarks(m))
        for m in members
    ]
    _show(("worker", "role", "model", "blocks", "batch", "lease", ""), rows)
    if degraded:
        Console().print("[yellow]Redis cannot be reached: this is from the kvstore's memory[/]")


def _share(member: Member) -> str:
    return f"{member.blocks} of {member.capacity}" if member.capacity else str(member.blocks)


def _remarks(member: Member) -> str:
    remarks = {"draining": member.draining, "owes a snapshot": member.wants_snapshot}
    return ", ".join(remark for remark, holds in remarks.items() if holds)


@kv_app.command(
    epilog=examples(
        "omni kv prefix 'You are a helpful assistant. ...'",
        "omni kv prefix --chat --file question.txt",
        "omni kv prefix --model sql --file question.txt",
        "omni kv prefix --file prompt.txt --json",
    )
)
def prefix(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; left out: --file.")] = None,
    file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Read the prompt from here.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's message, through the chat template.")] = False,
    model: Annotated[
        str | None, typer.Option(help="An adapter whose blocks are meant.", show_default="the model")
    ] = None,
    url: Url = None,
    kvstore: KvStore = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """How much of a prompt each worker has cached, as the proxy sees it and as the kvstore does.

    Only whole blocks are cached. Each tier counts those to be had from it or a nearer one. The proxy's view may be
    ahead of the store's by what it expects, and behind it by some milliseconds.
    """
    if (prompt is None) == (file is None):
        raise InvalidOptions("give the prompt, or --file, and not both")
    text = prompt if prompt is not None else file.read_text() if file is not None else ""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    if model is not None:
        body["model"] = model
    store = None if url and not kvstore else _kvstore(kvstore, home, name, port)
    seen, stored = asyncio.run(_prefix(ProxyPages(proxy_url(url, home, name, port)), store, body))
    if as_json:
        found = None if stored is None else [asdict(row) for row in stored]
        print(json.dumps({"proxy": seen, "kvstore": found}, indent=2))
        return
    print(f"{seen['tokens']} tokens, {seen['blocks']} whole blocks of {seen['block_size']}")
    _show(
        ("worker", *seen["tiers"]), [(worker, *map(str, depths)) for worker, depths in sorted(seen["members"].items())]
    )
    if stored is not None:
        print("\nkvstore:")
        _show(
            ("worker", "tier", "blocks"), [(row.worker_id or "any other", row.tier, str(row.blocks)) for row in stored]
        )


async def _prefix(
    proxy: ProxyPages, store: KvStoreClient | None, body: dict[str, Any]
) -> tuple[dict[str, Any], list[Reached] | None]:
    seen = await proxy.prefix(body)
    if store is None:
        return seen, None
    model = (await proxy.summary())["model"]
    return seen, await store.lookup(model, seen["block_size"], bytes.fromhex(seen["block_keys"]))


@kv_app.command(epilog=examples("omni kv hottest", "omni kv hottest --limit 50 --json"))
def hottest(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 10,
    url: Url = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """The prefixes that most requests of this proxy shared, by block key: length, requests, and who holds them."""
    found = asyncio.run(ProxyPages(proxy_url(url, home, name, port)).hottest(limit))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [(p["block_key"][:16], str(p["blocks"]), str(p["hits"]), ", ".join(p["members"])) for p in found["prefixes"]]
    _show(("prefix", "blocks", "requests", "held by"), rows)


@kv_app.command(
    epilog=examples(
        "omni kv verify", "omni kv verify p8000-decode-0", exit_codes="0 the index is right, 3 it differs somewhere"
    )
)
def verify(
    only: Annotated[
        list[str] | None, typer.Argument(metavar="WORKER_ID", help="Left out: all.", show_default=False)
    ] = None,
    settle_s: Annotated[float, typer.Option(min=0, help="Differences that pass within this time do not count.")] = 2.0,
    kvstore: KvStore = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Compare the index with what every worker says it holds.

    Missing blocks cost hits; stale ones send requests to blocks that are not there.
    """
    verdicts = asyncio.run(_verify(_kvstore(kvstore, home, name, port), only or (), settle_s))
    if as_json:
        print(json.dumps([asdict(verdict) | {"agrees": verdict.agrees} for verdict in verdicts], indent=2))
    else:
        rows = [
            (v.worker_id, str(v.held), str(v.stored), str(v.missing), str(v.stale), v.error or _judgement(v))
            for v in verdicts
        ]
        _show(("worker", "held", "in the index", "missing", "stale", ""), rows)
    if not all(verdict.agrees for verdict in verdicts):
        raise typer.Exit(EXIT_DIFFERS)


def _judgement(verdict: Verdict) -> str:
    return "right" if verdict.agrees else "differs"


async def _verify(store: KvStoreClient, only: Sequence[str], settle_s: float) -> list[Verdict]:
    members, _ = await store.members()
    known = {member.worker_id: member for member in members if member.role != "store"}
    if unknown := [worker for worker in only if worker not in known]:
        raise InvalidOptions(f"no worker {unknown[0]!r} (there are: {', '.join(known) or 'none'})")
    return await store.verify([known[worker] for worker in only] or list(known.values()), settle_s)


def _show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = borderless(headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False)
