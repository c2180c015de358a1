"""`omni explain`: why requests went where they went, and how right the prediction was."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from omni_cli.kv import ProxyPages
from omni_cli.options import AsJson, Home, Name, Port, Url, proxy_url
from omni_cli.report import borderless
from omni_common.command import examples

PHASES = (
    ("hold", None, "held_ms"),
    ("schedule", None, "schedule_ms"),
    ("queue", "queue_ms", "queue_ms"),
    ("adapter into a slot", "adapter_ms", None),
    ("prefill", "prefill_ms", "prefill_ms"),
    ("transfer", "transfer_ms", "transfer_ms"),
    ("wait for a seat", "seat_ms", None),
    ("to first token", "ttft_ms", "ttft_ms"),
    ("since arrival", None, "first_token_ms"),
    ("step", "step_ms", "step_ms"),
)
"""What is shown: its prediction and what was seen of it, by their names on the proxy's page."""
COUNTS = ("retries", "resumes", "output_tokens", "cached_tokens", "predicted_cached_tokens")
CHOSEN, UNKNOWN = "*", "-"
LARGE = 1e7
WIDTH = 200
"""Tables are not cut at narrower terminals: a figure that is cut is none."""


def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="The x-request-id of an answer; left out: the latest requests.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Requests, or candidates of each leg.")] = 10,
    url: Url = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Which workers a request was given, what every candidate would have cost, and predictions beside what was seen.

    All times are milliseconds; a tier above 0 breaks a service level. The proxy remembers its latest requests,
    about a thousand; [bold]*[/] marks the choice.
    """
    pages, console = ProxyPages(proxy_url(url, home, name, port)), _console()
    asked = pages.decisions(limit) if request_id is None else pages.decision(request_id, limit)
    page = asyncio.run(asked)
    if as_json:
        print(json.dumps(page, indent=2))
    elif request_id is None:
        _show_latest(page["decisions"], console)
    else:
        _show_request(page, console)


EXPLAIN_EPILOG = examples("omni explain", "omni explain my-request-7", "omni explain my-request-7 --limit 50 --json")


def _show_latest(requests: Sequence[Mapping[str, Any]], console: Console) -> None:
    has_adapters = any(request.get("adapter") for request in requests)
    adapters = ("adapter",) if has_adapters else ()
    table = borderless(("request", "arrived", "status", *adapters, "prefill", "decode", "reason", "predicted", "seen"))
    for request in requests:
        decision = request["decision"] or {}
        table.add_row(
            escape(request["request_id"]),
            _clock(request),
            _status(request),
            *((escape(request.get("adapter") or UNKNOWN),) if has_adapters else ()),
            escape(decision.get("prefill") or UNKNOWN),
            escape(decision.get("decode") or UNKNOWN),
            decision.get("reason", UNKNOWN),
            _number(decision.get("predicted", {}).get("ttft_ms")),
            _number(request["seen"].get("ttft_ms")),
        )
    console.print(table, highlight=False)


def _show_request(request: Mapping[str, Any], console: Console) -> None:
    caller = f", tenant {escape(request['tenant'])}" if request["tenant"] else ""
    asked_for = f", adapter {escape(request['adapter'])}" if request.get("adapter") else ""
    took_ms = request["seen"].get("e2e_ms")
    took = "" if took_ms is None else f" after {_number(took_ms)} ms"
    console.print(
        f"[bold]{escape(request['request_id'])}[/] {_status(request)}{took}, arrived {_clock(request)}{caller}, "
        f"priority {request['priority']}{asked_for}",
        highlight=False,
        soft_wrap=True,
    )
    several = len(request["sequences"]) > 1
    for index, sequence in enumerate(request["sequences"]):
        if several:
            console.print(f"\n[bold]sequence {index}[/]")
        for number, decision in enumerate(sequence["decisions"], 1):
            _show_decision(number, decision, console)
        _show_phases(sequence, console)
        _show_outcome(sequence["seen"], console)


def _show_outcome(seen: Mapping[str, Any], console: Console) -> None:
    facts = [f"{name.replace('_', ' ')} {seen[name]}" for name in COUNTS if name in seen]
    if seen.get("hedged"):
        facts.append(f"hedged, {seen['prefill_worker'] or 'nobody'} answered first")
    if seen.get("first_token_source"):
        facts.append(f"first token: {seen['first_token_source']}")
    console.print(", ".join(map(escape, facts)), highlight=False, soft_wrap=True)


def _show_decision(number: int, decision: Mapping[str, Any], console: Console) -> None:
    prefill, decode = decision["prefill"], decision["decode"]
    choice = f"prefill on {prefill}, decode on {decode}" if prefill else f"{decode} alone"
    console.print(
        f"\n[bold]{number}. {escape(choice)}[/]: {decision['reason']} "
        f"({decision['policy']}, {decision['uncached_tokens']} uncached tokens)",
        highlight=False,
        soft_wrap=True,
    )
    for leg, candidates in decision["candidates"].items():
        if not candidates:
            continue
        terms = [term for term in candidates[0] if term != "worker"]
        table = borderless(("", leg, *terms))
        taken = prefill if leg == "prefill" else decode
        for candidate in candidates:
            is_taken = candidate["worker"] == taken and (leg != "alone" or not prefill)
            figures = (_number(candidate.get(term)) for term in terms)
            table.add_row(CHOSEN if is_taken else "", escape(candidate["worker"]), *figures)
        console.print(table, highlight=False)


def _show_phases(sequence: Mapping[str, Any], console: Console) -> None:
    """Predictions are those of the decision by which the prompt was computed."""
    predicted = _predicted(sequence)
    table = borderless(("", "predicted", "seen"))
    for label, foreseen, seen in PHASES:
        if seen is not None or foreseen in predicted:
            table.add_row(label, _number(predicted.get(foreseen or "")), _number(sequence["seen"].get(seen or "")))
    console.print()
    console.print(table, highlight=False)
    if "confidence" in predicted:
        console.print(f"confidence {predicted['confidence']:.0%}", highlight=False)


def _predicted(sequence: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a prefill and its hedge that of the one whose worker answered."""
    prompts = [d for d in sequence["decisions"] if d["reason"] != "continued"]
    answered = sequence["seen"].get("prefill_worker")
    found: list[Mapping[str, Any]] = [d for d in prompts if answered and d["prefill"] == answered] or prompts
    return found[-1]["predicted"] if found else {}


def _status(request: Mapping[str, Any]) -> str:
    if request["status"] is None:
        return "running"
    why = request.get("reason") or request["error"]
    return f"{request['status']} {why}" if why else str(request["status"])


def _clock(request: Mapping[str, Any]) -> str:
    """The time of day, UTC."""
    return str(request["arrived"])[11:23]


def _number(value: float | None) -> str:
    """One decimal where it matters; large ones, such as penalties, short."""
    if value is None:
        return UNKNOWN
    if abs(value) >= LARGE:
        return f"{value:.3g}"
    return f"{value:.1f}" if value % 1 else f"{value:.0f}"


def _console() -> Console:
    return Console(width=max(Console().width, WIDTH))
