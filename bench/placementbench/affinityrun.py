"""The cases that decide whether the router should know about experts, their table and the verdict."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sidebyside.tables import Block

from omni_placement.layout import Topology
from omni_placement.solvers import SOLVERS
from placementbench.affinity import SHARES, Fleet, LargeTraffic, TinyTraffic, Traffic, routings
from placementbench.contenders import OURS
from placementbench.router import Routed
from placementbench.shapes import DEEPSEEK_V3
from placementbench.texts import KINDS

STEPS, GROUPS, WORTH = 40, 5, 0.03
"""Steps drawn per group; groups of the fleet; the share of a step that routing by affinity has to save."""
EXTRAS = (0, 1)
Record = Mapping[str, Any]
_WAYS = ("filled", "own", "hot, cold")
_NOTES = (
    f"{GROUPS} groups; kinds of text {', '.join(KINDS)} in even shares or 40, 25, 15, 12 and 8%; the layout of each "
    f"group solved by {OURS!r} for the group's traffic; means of steps drawn at random, the same number in each group",
    "mixed: every group gets every kind; filled: groups are filled with one kind after the other, to the same number "
    "of tokens; own: a group per kind; hot, cold: the most frequent kind in groups of its own. Other columns say how "
    "much more or less than mixed",
    "step load: what a token waits for, tokens of the slowest rank summed over layers, over those of a perfectly "
    "balanced step of an equally busy group; active experts: on the rank that has most, which is what a small decode "
    "step reads from memory; last: the filled groups when traffic does not keep to them",
    "tiny on 4: choices that the tiny model's router made, other tokens than the layouts were solved for; V3 on "
    "32: its counts stretched over 58 x 256 experts, 8 drawn per token. The kinds are as unlike as text gets, and all "
    "but chat are foreign to this model: more affinity than a fleet would see",
    "not measured: prefix-cache hits and sessions lost to routing by kind; telling the kind of a prompt before it ran",
)


def affinity_records(routed: Routed, seed: int, steps: int = STEPS) -> list[Record]:
    """One record per model, extra slots, tokens in a group's step, shares of kinds and way of routing."""
    return [record for fleet, facts in _fleets(routed, seed) for record in _of_fleet(fleet, facts, seed, steps)]


def _fleets(routed: Routed, seed: int) -> Iterator[tuple[Fleet, dict[str, Any]]]:
    large = LargeTraffic(routed, DEEPSEEK_V3.num_layers, DEEPSEEK_V3.num_experts, 8, seed)
    tiny = TinyTraffic(routed)
    cases: list[tuple[str, Traffic, tuple[int, int, int], tuple[int, ...]]] = [
        ("tiny on 4", tiny, (4, routed.num_experts, 4), (8, 64, 1024)),
        ("V3 on 32", large, (DEEPSEEK_V3.num_layers, DEEPSEEK_V3.num_experts, 32), (64, 1024, 16384)),
    ]
    for model, traffic, (layers, experts, ranks), sizes in cases:
        for extra in EXTRAS:
            topology = Topology(layers, experts, ranks, experts // ranks + extra)
            for tokens in sizes:
                facts = {"model": model, "extra": extra, "tokens": tokens}
                yield Fleet(traffic, topology, GROUPS, tokens, SOLVERS[OURS]), facts


def _of_fleet(fleet: Fleet, facts: dict[str, Any], seed: int, steps: int) -> Iterator[Record]:
    for title, shares in SHARES.items():
        ways = routings(KINDS, shares, fleet.groups)
        for way, groups in ways.items():
            random = np.random.default_rng(seed)
            layouts = fleet.layouts(groups)
            record = {**facts, "shares": title, "way": way, **fleet.steps(groups, layouts, steps, random)}
            if way == "filled":
                # What these groups do with traffic that does not keep to them.
                strayed = fleet.steps(ways["mixed"], layouts, steps, random)
                record["strayed"] = strayed["step_load"]
            yield record


def affinity_block(records: Sequence[Record]) -> Block:
    """A row per fleet, a pair of columns per way; to the mixed way's."""
    head = (
        *("model", "extra slots", "tokens", "shares", "mixed: step load"),
        *(f"{way}: step load" for way in _WAYS),
        *(f"{way}: active experts" for way in _WAYS),
        *("own: busiest group", "filled, mixed traffic on it"),
    )
    rows = []
    for mixed in (record for record in records if record["way"] == "mixed"):
        by_way = {record["way"]: record for record in records if _key(record) == _key(mixed)}
        rows.append(
            (
                *(mixed["model"], str(mixed["extra"]), f"{mixed['tokens']:,}", mixed["shares"]),
                f"{mixed['step_load']:.3f}",
                *(f"{-saved(records, by_way[way], 'step_load'):+.1%}" for way in _WAYS),
                *(f"{-saved(records, by_way[way], 'active'):+.1%}" for way in _WAYS),
                f"{by_way['own']['busiest'] / mixed['step_load'] - 1:+.1%}",
                f"{by_way['filled']['strayed'] / mixed['step_load'] - 1:+.1%}",
            )
        )
    return Block("Routing kinds of text to groups of their own (simulated)", head, rows, names=4, notes=_NOTES)


def verdict(records: Sequence[Record]) -> str:
    """By the way that keeps groups equally busy, on fleets with spare slots, which is what placement is for."""
    chosen = [record for record in records if record["way"] == "filled" and record["extra"] > 0]
    models = list(dict.fromkeys(record["model"] for record in records))
    parts, is_worth = [], True
    for figure, what in (("step_load", "of the slowest rank's tokens"), ("active", "of its active experts")):
        for model in models:
            found = [saved(records, record, figure) for record in chosen if record["model"] == model]
            parts.append(f"{np.mean(found):.1%} {what} on {model} ({min(found):.1%} to {max(found):.1%})")
            is_worth &= figure != "step_load" or bool(np.mean(found) >= WORTH)
    strayed = [record["strayed"] / _mixed(records, record)["step_load"] - 1 for record in chosen]
    what = "helps" if is_worth else f"is left out, it saves less than {WORTH:.0%} of a step"
    return (
        f"routing by expert affinity {what}; with extra slots and equally busy groups it saves {', '.join(parts)}. "
        f"Traffic that strays from its groups makes their steps {min(strayed):.0%} to {max(strayed):.0%} longer"
    )


def saved(records: Sequence[Record], record: Record, figure: str) -> float:
    """Share of the mixed way's figure, same fleet."""
    return 1 - float(record[figure] / _mixed(records, record)[figure])


def _mixed(records: Sequence[Record], record: Record) -> Record:
    return next(other for other in records if other["way"] == "mixed" and _key(other) == _key(record))


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("model", "extra", "tokens", "shares"))
