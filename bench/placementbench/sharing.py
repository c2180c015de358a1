"""What one budget of copies over all layers is worth, beside the same number for each and all or nothing.

Where our solver lays out every layer, only the division of the budget differs.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sidebyside.tables import Block

from omni_placement.layout import Topology
from omni_placement.problem import Problem
from omni_placement.solvers import SOLVERS
from placementbench.contenders import OURS
from placementbench.families import FAMILIES, Loads, Shape
from placementbench.router import Routed
from placementbench.shapes import DEEPSEEK_V3, QWEN3_235B, System

SYSTEMS = (System(DEEPSEEK_V3, 32), System(DEEPSEEK_V3, 64), System(QWEN3_235B, 16))
BUDGETS = (0.125, 0.25, 0.5)
"""Copies per rank and layer beyond one of each expert; a rank has room for two."""


_WAYS = {
    "none": "none",
    "all_or_nothing": "all or nothing",
    "same": "same",
    "greedy_lpt": "same, greedy_lpt",
    "shared": "shared",
}


def sharing_records(routed: Routed, seed: int, systems: Sequence[System] = SYSTEMS) -> list[dict[str, Any]]:
    """Step load over a perfectly balanced step, by way of dividing the budget and per family of loads."""
    return [
        _record(system, budget, family, routed, seed) for system in systems for budget in BUDGETS for family in FAMILIES
    ]


def _record(system: System, budget: float, family: str, routed: Routed, seed: int) -> dict[str, Any]:
    topology = system.topology(2)
    shape = Shape(topology.num_layers, topology.num_experts, system.ranks)
    random = np.random.default_rng([seed, zlib.crc32(f"{system.name} {family}".encode())])
    load = FAMILIES[family](shape, random, routed).before
    copies = int(budget * system.ranks)
    total = copies * topology.num_layers
    perfect = load.sum() / system.ranks
    return {
        "system": system.name,
        "budget": budget,
        "family": family,
        "none": _alone(topology, load, np.zeros(len(load), dtype=int)) / perfect,
        "same": _alone(topology, load, np.full(len(load), copies)) / perfect,
        "all_or_nothing": _alone(topology, load, _all_or_nothing(topology, load, total)) / perfect,
        "greedy_lpt": SOLVERS["greedy_lpt"](Problem(topology, load, budget=total)).step_load(load) / perfect,
        "shared": SOLVERS[OURS](Problem(topology, load, budget=total)).step_load(load) / perfect,
    }


def _all_or_nothing(topology: Topology, load: Loads, total: int) -> Any:
    """A copy per rank for the layers whose slowest rank is the highest with experts in order, as many as there are
    copies for; none for others. How OmniPlacement's static step divides its budget."""
    budgets = np.zeros(len(load), dtype=int)
    slowest = SOLVERS["identity"](Problem(topology, load)).rank_loads(load).max(axis=1)
    budgets[np.argsort(-slowest)[: total // topology.num_ranks]] = topology.num_ranks
    return budgets


def _alone(topology: Topology, load: Loads, budgets: Any) -> float:
    """Step load with a budget of its own for each layer."""
    layer = replace(topology, num_layers=1)
    return sum(
        SOLVERS[OURS](Problem(layer, row[None], budget=int(budget))).step_load(row[None])
        for row, budget in zip(load, budgets, strict=True)
    )


def sharing_block(records: Sequence[dict[str, Any]]) -> Block:
    """Means over the families; `saved` is what the shared budget takes off the best of the other ways."""
    rows = []
    for system, budget in dict.fromkeys((record["system"], record["budget"]) for record in records):
        chosen = [record for record in records if (record["system"], record["budget"]) == (system, budget)]
        ways = [float(np.mean([record[way] for record in chosen])) for way in _WAYS]
        saved = 1 - ways[-1] / min(ways[:-1])
        rows.append((system, f"{budget:g}", *(f"{way:.4f}" for way in ways), f"{saved:.2%}"))
    head = ("system", "copies per rank and layer", *_WAYS.values(), "saved")
    notes = (
        "step load over a perfectly balanced step, mean over the families. all or nothing: a copy per rank for the "
        "layers with the slowest ranks, none for others, as OmniPlacement's static step does; same: as many for each "
        "layer; shared: one budget for all layers; saved: of the best of the other ways",
        f"every layer is laid out by {OURS!r}, so only the division of the budget differs, but for greedy_lpt",
    )
    return Block("One budget over all layers", head, rows, notes=notes)
