"""What a report is about: one problem, the layouts that answer it, and their figures, all taken from the layouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from omni_placement.layout import Layout
from omni_placement.migration import Round, moved_experts
from omni_placement.problem import Problem

Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Measured:
    """A layout under the load of a problem. `seconds` is what solving took, where it was solved here."""

    name: str
    layout: Layout
    problem: Problem
    seconds: float | None = None

    @cached_property
    def rank_loads(self) -> Values:
        """Tokens each rank computes, (layers, ranks)."""
        return self.layout.rank_loads(self.problem.load)

    @cached_property
    def balancedness(self) -> Values:
        """Mean over slowest rank, (layers,), among ranks that may hold experts."""
        return self.layout.balancedness(self.problem.load, self.problem.excluded_ranks)

    @cached_property
    def step_load(self) -> float:
        """Tokens of the slowest rank, summed over layers."""
        return self.layout.step_load(self.problem.load)

    @property
    def copies(self) -> Counts:
        """Copies beyond one of each expert, (layers,)."""
        copies: Counts = (self.layout.replicas - 1).sum(axis=1, dtype=np.int64)
        return copies


@dataclass(frozen=True, eq=False)
class Study:
    """`after` beside `before`; `others` are further layouts for the same problem.

    `bound` is the proven lower bound on the slowest rank, (layers,). `rounds` lead from `before` to `after`; None where
    there is no way, or none is asked for.
    """

    title: str
    problem: Problem
    before: Measured
    after: Measured
    bound: Values
    rounds: tuple[Round, ...] | None = None
    others: Sequence[Measured] = ()

    @cached_property
    def is_usable(self) -> npt.NDArray[np.bool_]:
        """Ranks that may hold experts, (ranks,)."""
        return self.problem.capacity > 0

    @property
    def layouts(self) -> tuple[Measured, ...]:
        """Every layout once, `before` first."""
        return self.before, *(m for m in self.others if m.name not in (self.before.name, self.after.name)), self.after

    @cached_property
    def mean_rank_load(self) -> Values:
        """Tokens per usable rank, (layers,)."""
        mean: Values = self.problem.load.sum(axis=1) / self.is_usable.sum()
        return mean

    @cached_property
    def best_balancedness(self) -> Values:
        """What the bound allows, (layers,)."""
        return np.where(self.bound > 0, self.mean_rank_load / np.where(self.bound > 0, self.bound, 1.0), 1.0)

    @property
    def step_bound(self) -> float:
        return float(self.bound.sum())

    def gap(self, measured: Measured) -> float:
        """How far a layout's step load lies above the bound, as a share of the bound; 0 where there is no load."""
        return measured.step_load / self.step_bound - 1.0 if self.step_bound > 0 else 0.0

    def is_possible(self, measured: Measured) -> bool:
        """Whether a layout leaves the ranks alone that may hold nothing; one from before a rank failed may not. The
        bound says nothing of those that do not."""
        return not measured.layout.indicator[~self.is_usable].any()

    def relative_load(self, measured: Measured) -> Values:
        """Rank loads over the mean of their layer's usable ranks, (layers, ranks); NaN for ranks that hold nothing."""
        mean = np.where(self.mean_rank_load > 0, self.mean_rank_load, 1.0)[:, None]
        return np.where(self.is_usable, measured.rank_loads / mean, np.nan)

    @cached_property
    def expert_share(self) -> Values:
        """Expert loads over the mean of their layer, (layers, experts)."""
        mean = self.problem.load.mean(axis=1, keepdims=True)
        return np.where(mean > 0, self.problem.load / np.where(mean > 0, mean, 1.0), 0.0)

    @cached_property
    def traffic(self) -> Counts:
        """Expert weights sent, (source ranks, target ranks); the diagonal stays inside a rank."""
        sent = np.zeros((self.problem.topology.num_ranks,) * 2, dtype=np.int64)
        for step in self.rounds or ():
            for move in step.moves:
                sent[move.source_rank, move.target_rank] += 1
        return sent

    def moved(self, measured: Measured) -> int:
        """Expert weights that must reach a rank which does not hold them in `before`."""
        return moved_experts(self.before.layout, measured.layout)

    @property
    def num_sent(self) -> int:
        """Expert weights that go over the network."""
        return int(self.traffic.sum() - np.trace(self.traffic))

    @property
    def num_between_hosts(self) -> int:
        hosts = self.problem.topology.hosts
        return int(self.traffic[hosts[:, None] != hosts[None, :]].sum())

    @property
    def sent_bytes(self) -> int:
        """0 where the size of an expert is not known."""
        return self.num_sent * self.problem.topology.expert_bytes
