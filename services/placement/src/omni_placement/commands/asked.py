"""What a plan is asked for, wherever its parts come from: files, options, a running service."""

import hashlib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from omni_common.addresses import checked_address
from omni_common.errors import InvalidRequest, NotFound
from omni_placement.commands import formats
from omni_placement.commands.client import PlacementService, load_from_wire
from omni_placement.commands.work import Shape, topology_of
from omni_placement.layout import Layout, Topology
from omni_placement.load import Phase
from omni_placement.problem import Loads, Pin, Problem


@dataclass(frozen=True, slots=True)
class Where:
    """How the service is to be found, as the command line says it."""

    address: str | None
    name: str | None
    port: int | None
    home: Path | None

    def service(self, context: typer.Context) -> PlacementService:
        """Raises what `omni` raises where no stack is meant, and `InvalidRequest` where it is not `omni` that asks
        or the address is none."""
        if self.address is not None:
            return PlacementService(_checked(self.address))
        services: Any = context.obj
        if services is None:
            raise InvalidRequest("which service? Give --placement host:port", field="--placement")
        return PlacementService(services.address_of("placement", name=self.name, port=self.port, home=self.home))


def _checked(address: str) -> str:
    try:
        return checked_address(address)
    except ValueError as error:
        raise InvalidRequest(f"--placement {error}", field="--placement") from None


@dataclass(frozen=True, slots=True)
class Limits:
    """Constraints on a layout; `excluded` besides those of the service."""

    budget: int | None = None
    max_replicas: int = 0
    excluded: tuple[int, ...] = ()
    pinned: tuple[Pin, ...] = ()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where load, ranks and layout in force come from."""

    load: Path | None
    phase: Phase | None
    current: Path | None
    service: PlacementService | None = None
    label: str = ""


@dataclass(frozen=True, eq=False)
class Asked:
    """The problem, and what a report says of its origin."""

    problem: Problem
    title: str
    origin: Mapping[str, str]


def asked(sources: Sources, shape: Shape, limits: Limits) -> Asked:
    """Raises `InvalidRequest` where something is missing or contradicts, naming the option."""
    known = _from_service(sources) if sources.service is not None else _Known()
    load, spread, origin = known.load, known.spread, known.origin
    if sources.load is not None:
        load, spread = formats.read_load(sources.load, sources.phase), None
        digest = hashlib.sha256(np.ascontiguousarray(load).tobytes()).hexdigest()[:16]
        origin = f"{sources.load.name} (SHA-256 of the counts {digest}...)"
    if load is None:
        raise _no_load(sources)
    current, told = known.current, known.topology
    if sources.current is not None:
        told = formats.read_layout(sources.current).layout.topology if told is None else told
    topology = topology_of(shape, load, told)
    if sources.current is not None:
        current = formats.read_layout(sources.current, topology).layout
    elif current is not None:
        current = formats.under(current, topology, "the layout in force")
    excluded = frozenset(limits.excluded) | known.excluded
    problem = Problem(
        topology, load, spread, current, limits.budget, limits.pinned, excluded, limits.max_replicas
    )  # fmt: skip
    title = f"Expert layout for {sources.label or (sources.load.stem if sources.load is not None else '')}"
    return Asked(problem, title, {"Load source": _size(origin, load)} | _constraints(problem) | {"Command": command()})


def command() -> str:
    """The command as it could be typed again."""
    return shlex.join(["omni", *sys.argv[1:]])


@dataclass(frozen=True, eq=False)
class _Known:
    load: Loads | None = None
    spread: Loads | None = None
    origin: str = ""
    topology: Topology | None = None
    current: Layout | None = None
    excluded: frozenset[int] = frozenset()


def _from_service(sources: Sources) -> _Known:
    if (service := sources.service) is None:
        return _Known()
    group = service.resolve(sources.label, "--from-service")
    in_force = service.in_force(group)
    topology = in_force.named.layout.topology
    answer = service.load(group)
    load = load_from_wire(answer, topology, sources.phase)
    spread = None
    if sources.phase is None and len(answer.spread):
        spread = np.array(answer.spread, dtype=np.float64).reshape(topology.num_layers, topology.num_experts)
    what = f"{sources.phase.value} load" if sources.phase is not None else "forecast"
    return _Known(
        load, spread, f"{what} of {group.label} at its placement service", topology, in_force.named.layout,
        frozenset(in_force.status.excluded_ranks),
    )  # fmt: skip


def _no_load(sources: Sources) -> InvalidRequest | NotFound:
    if sources.service is None:
        return InvalidRequest("which load? Give a file, or --from-service MODEL", field="load")
    return NotFound(
        f"nothing was reported for {sources.label!r} yet; send it requests, or give a load file", field="load"
    )


def _size(origin: str, load: Loads) -> str:
    return f"{origin}: {load.shape[0]} layers of {load.shape[1]} experts, {load.sum():,.0f} tokens"


def _constraints(problem: Problem) -> dict[str, str]:
    said = {
        "at most {} spare copies": problem.budget,
        "at most {} copies of an expert": problem.max_replicas or None,
        "ranks {} excluded": ", ".join(map(str, sorted(problem.excluded_ranks))) or None,
        "{} pinned copies": len(problem.pinned) or None,
        "shared-expert ranks {}": ", ".join(map(str, problem.topology.shared_ranks)) or None,
    }
    texts = [text.format(value) for text, value in said.items() if value is not None]
    return {"Constraints": "; ".join(texts)} if texts else {}
