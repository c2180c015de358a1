"""The figures of a study in numbers, for programs and for tables."""

from typing import Any

from omni_placement.report.study import Measured, Study
from omni_placement.report.units import percent


def row(study: Study, measured: Measured) -> dict[str, Any]:
    """One layout: loads in tokens, shares as such, time in seconds (None where it was not solved here). `above_bound`
    is None where the layout uses ranks that it may not use."""
    return {
        "name": measured.name,
        "balancedness_mean": float(measured.balancedness.mean()),
        "balancedness_min": float(measured.balancedness.min()),
        "step_load": measured.step_load,
        "above_bound": study.gap(measured) if study.is_possible(measured) else None,
        "spare_copies": int(measured.copies.sum()),
        "seconds": measured.seconds,
    }


def above_bound(study: Study, measured: Measured) -> str:
    """For tables."""
    return percent(study.gap(measured)) if study.is_possible(measured) else "uses excluded ranks"


def summary(study: Study) -> dict[str, Any]:
    topology = study.problem.topology
    moves = {
        "experts": study.num_sent,
        "bytes": study.sent_bytes,
        "between_hosts": study.num_between_hosts,
        "rounds": len(study.rounds or ()),
    }
    return {
        "layers": topology.num_layers,
        "experts": topology.num_experts,
        "ranks": topology.num_ranks,
        "usable_ranks": int(study.is_usable.sum()),
        "hosts": int(topology.hosts[-1]) + 1,
        "slots_per_rank": topology.slots_per_rank,
        "tokens": float(study.problem.load.sum()),
        "hottest_expert": float(study.expert_share.max()),
        "before": row(study, study.before),
        "after": row(study, study.after),
        "bound": {
            "step_load": study.step_bound,
            "balancedness_mean": float(study.best_balancedness.mean()),
            "balancedness_min": float(study.best_balancedness.min()),
        },
        "moves": moves if study.rounds is not None else None,
    }
