"""The figures as tables, and what the reader must know of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sidebyside.tables import Block

from placementbench.contenders import DEEPSEEK, OURS, VLLM
from placementbench.families import LATER, SOON
from placementbench.goals import WHEN, Record, best_gap


def blocks_of(records: Sequence[Record]) -> list[Block]:
    """Balance, gap, time and moves by system and spare slots, then by family of loads."""
    return [
        _block("Balance of each solver, by system", ("system", "extra slots"), ("system", "extra"), records),
        _block("Balance of each solver, by family of loads", ("loads",), ("family",), records),
    ]


def _block(title: str, heads: Sequence[str], keys: Sequence[str], records: Sequence[Record]) -> Block:
    names = [OURS, VLLM, *(name for name in records[0]["contenders"] if name not in (OURS, VLLM))]
    head = (*heads, *names, "worst layer", "others'", "gap", "others'", "moved soon", "later", "plan, ms", "vllm's")
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record[key]) for key in keys), []).append(record)
    rows = [(*at, *_cells(chosen, names)) for at, chosen in groups.items()]
    return Block(title, (*head, "ratio"), rows, names=len(heads))


def _cells(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    def every(name: str, figure: str) -> list[Any]:
        return [record["contenders"][name][figure] for record in records]

    best_other = max(min(every(name, "worst_layer")) for name in names if name != OURS)
    ours_ms, theirs_ms = (float(np.median(every(name, "wall_ms"))) for name in (OURS, VLLM))
    moved = {name: [sum(each["moved_bytes"] for each in every(name, when)) for when in WHEN] for name in names}
    return [
        *(f"{np.mean(every(name, 'balance')):.4f}" for name in names),
        f"{min(every(OURS, 'worst_layer')):.4f}",
        f"{best_other:.4f}",
        f"{np.mean(every(OURS, 'gap')):.2%}",
        f"{np.mean([best_gap(record) for record in records]):.2%}",
        *(_ratio(*pair) for pair in zip(moved[OURS], moved[DEEPSEEK], strict=True)),
        f"{ours_ms:.1f}",
        f"{theirs_ms:.1f}",
        f"{ours_ms / theirs_ms:.2f}",
    ]


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "none" if not ours else "more than none"


def home_notes(records: Sequence[Record]) -> list[str]:
    """How far balance was bought by spreading expert groups over hosts, where there are hosts."""
    lines = []
    for system in dict.fromkeys(record["system"] for record in records):
        chosen = [record["contenders"] for record in records if record["system"] == system]
        at_home = {name: np.mean([each[name]["at_home"] for each in chosen]) for name in chosen[0]}
        if min(at_home.values()) < 1:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in at_home.items())
            lines.append(f"{system}: of a group's experts, so many are on the host that has most of them: {shares}")
    return lines


def notes_of(repeats: int, foreign: float) -> list[str]:
    """What the reader must know of the figures."""
    return [
        "under a solver's name its balance: mean over slowest rank's tokens, averaged over layers and cells; worst "
        "layer: the least even of any; gap: what the slowest ranks, summed over layers, are above the proven lower "
        "bound; others': of the best of them, cell by cell (worst layer: over all cells)",
        "extra slots per rank and layer beyond those that hold every expert once, rounded up to whole slots per rank: "
        "256 experts on 144 ranks have 2 slots each and on 288 ranks 1, so 32 slots are spare with no extra ones. "
        "All slots may be used. EP144 is 128 ranks of routed experts and 16 of the shared one, EP288 is 256 and 32",
        "vllm: the default policy of the installed vLLM, counted its way where it puts an expert on a rank twice; "
        "deepseek_eplb: the same algorithm with such copies parted. Hosts and groups count where the system names them "
        "(hierarchical policy), else all is one host (global policy). greedy_lpt is what OmniPlacement's static step "
        "does, too: replicas to the largest share, then longest first",
        "loads: zipf (exponents 0.4-1.0), lognormal (sigma 0.4-1.2), drifting (random walk), bursty (2% of the experts "
        "5 to 20 times as busy), adversarial (Graham's worst case, secret perfect packings, two sizes), and real: "
        "choices of the tiny model's router over five kinds of text. Its 16 experts are put in order of their counts, "
        "spread evenly over the layer's experts, and logarithms are interpolated between them; its 4 layers repeat, "
        "the experts in another order in each",
        "moved soon, later: experts that a rank is sent in a re-plan because it did not hold them, over what "
        "deepseek_eplb's takes, each from its own layout. "
        f"Soon {SOON[0]:.0%} of the experts have changed places and all got a lognormal factor of sigma {SOON[1]:g}, "
        f"later {LATER[0]:.0%} and {LATER[1]:g} (adversarial: places alone); real: a fifth of the traffic of chat, "
        "code and prose has turned to prose, numbers and other languages, then all; drifting: 5 and 30 windows on; "
        "bursty: half of the bursts are others, then all",
        f"plan: median of {repeats} warm runs on one thread, contenders in turns, imports and compilation not counted; "
        f"other programs used {foreign:.0%} of the machine",
    ]
