"""The default solver in parts. Pure, deterministic; loops are compiled (see `warm_up`)."""

from omni_placement.solving.bound import lower_bound
from omni_placement.solving.solver import omni, warm_up

__all__ = ["lower_bound", "omni", "warm_up"]
