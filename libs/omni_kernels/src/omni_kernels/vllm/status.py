"""`omni kernels status`: what the engines of a stack run on Omni's ops, or what could be loaded on this machine."""

import json
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

WORKERS = ("prefill", "decode")
_TIMEOUT_S = 5.0
_SAMPLE = re.compile(r"^omni_engine_kernel_calls_total\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Calls = Mapping[str, Mapping[str, int]]
"""op -> backend -> calls."""


def status(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="The stack's name.")] = None,
    port: Annotated[int | None, typer.Option(help="The stack by its port.")] = None,
    home: Annotated[Path | None, typer.Option(envvar="OMNI_CLI_HOME", help="Where state lies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Which op ran where: per worker, op, backend and calls; without a stack, which backends can be loaded, or why not.

    Workers count all calls of their engine's processes and are read every few seconds. An op that the backend has no
    kernel for runs as its meaning.
    """
    urls: dict[str, str] = context.obj.metrics_of(WORKERS, name=name, port=port, home=home)
    if urls:
        calls = {worker: read(url) for worker, url in urls.items()}
        print(json.dumps({"workers": calls}, indent=2) if as_json else _calls_table(calls))
    else:
        found = loadable()
        table = f"no stack runs; on this machine:\n{_backends_table(found)}"
        print(json.dumps({"backends": found}, indent=2) if as_json else table)


def loadable() -> dict[str, dict[str, Any]]:
    """Of each backend how many ops it has kernels for, or why it cannot be loaded here."""
    from omni_kernels.load import BACKENDS, kernels_of
    from omni_kernels.ops import OPS

    found: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        try:
            found[backend] = {"kernels": len(kernels_of(backend)), "ops": len(OPS)}
        except RuntimeError as error:
            found[backend] = {"reason": str(error)}
    return found


def read(url: str) -> Calls | None:
    """The calls a worker's metrics tell of; None where it cannot be asked."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return calls_in(answer.read().decode())
    except OSError:
        return None


def calls_in(metrics: str) -> Calls:
    """Of a page of metrics in Prometheus' text form."""
    calls: dict[str, dict[str, int]] = {}
    for labels, value in _SAMPLE.findall(metrics):
        named = dict(_LABEL.findall(labels))
        calls.setdefault(named["op"], {})[named["backend"]] = int(float(value))
    return calls


def _calls_table(by_worker: Mapping[str, Calls | None]) -> str:
    lines = [f"{'worker':<14} {'op':<24} {'backend':<10} {'calls':>14}"]
    for worker, calls in by_worker.items():
        if not calls:
            what = "does not answer" if calls is None else "runs on vLLM's kernels"
            lines.append(f"{worker:<14} {what}")
        for op, backends in (calls or {}).items():
            lines += [f"{worker:<14} {op:<24} {backend:<10} {count:>14,}" for backend, count in backends.items()]
    return "\n".join(lines)


def _backends_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for backend, facts in found.items():
        reason, kernels, ops = facts.get("reason"), facts.get("kernels", 0), facts.get("ops", 0)
        lines.append(f"{backend:<8} {reason or f'{kernels} kernels; {ops - kernels} ops as their meaning'}")
    return "\n".join(lines)
