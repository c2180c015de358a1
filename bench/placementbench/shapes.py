"""Models and the ranks they are spread over."""

from dataclasses import dataclass

from omni_placement.layout import Topology


@dataclass(frozen=True, slots=True)
class Model:
    """`expert_bytes`: weights of one expert of one layer."""

    name: str
    num_layers: int
    num_experts: int
    expert_bytes: int


DEEPSEEK_V3 = Model("DeepSeek-V3", 58, 256, 3 * 7168 * 2048)
"""FP8 weights."""
QWEN3_235B = Model("Qwen3-235B", 94, 128, 3 * 4096 * 1536 * 2)
"""BF16 weights."""


@dataclass(frozen=True, slots=True)
class System:
    """`shared_ranks`: how many, after the others, hold the shared expert and no routed one."""

    model: Model
    ranks: int
    shared_ranks: int = 0
    hosts: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        """Such as DeepSeek-V3 on 32, DeepSeek-V3 EP144 or DeepSeek-V3 on 4 x 8, 8 groups."""
        if self.shared_ranks:
            return f"{self.model.name} EP{self.ranks + self.shared_ranks}"
        ranks = f"{self.hosts} x {self.ranks // self.hosts}, {self.groups} groups" if self.hosts > 1 else self.ranks
        return f"{self.model.name} on {ranks}"

    def topology(self, extra: int) -> Topology:
        """`extra` slots per rank and layer beyond those that hold every expert once, rounded up to whole slots."""
        return Topology(
            self.model.num_layers,
            self.model.num_experts,
            self.ranks + self.shared_ranks,
            -(-self.model.num_experts // self.ranks) + extra,
            ranks_per_host=self.ranks // self.hosts if self.hosts > 1 else 0,
            shared_ranks=tuple(range(self.ranks, self.ranks + self.shared_ranks)),
            num_groups=self.groups,
            expert_bytes=self.model.expert_bytes,
        )


SYSTEMS = (
    System(DEEPSEEK_V3, 32),
    System(DEEPSEEK_V3, 32, hosts=4, groups=8),
    System(DEEPSEEK_V3, 64),
    System(DEEPSEEK_V3, 144),
    System(DEEPSEEK_V3, 128, shared_ranks=16),
    System(DEEPSEEK_V3, 288),
    System(DEEPSEEK_V3, 256, shared_ranks=32),
    System(QWEN3_235B, 16),
    System(QWEN3_235B, 64),
)
QUICK = (System(DEEPSEEK_V3, 32), System(DEEPSEEK_V3, 64), System(QWEN3_235B, 16))
BUDGETS = (0, 1, 2)
"""Extra slots per rank and layer."""
