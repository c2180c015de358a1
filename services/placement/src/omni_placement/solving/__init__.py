"""The default solver in parts. Pure, deterministic; loops are compiled."""

from omni_placement.solving.bound import lower_bound
from omni_placement.solving.solver import omni

__all__ = ["lower_bound", "omni"]
