"""Expert load: what was reported, what is expected, and whether it has changed for good. Pure; clocks are passed in."""

from omni_placement.load.book import LoadBook
from omni_placement.load.forecast import Forecast, Smoothing
from omni_placement.load.group import LoadRules
from omni_placement.load.windows import Phase, Stream, Window

__all__ = ["Forecast", "LoadBook", "LoadRules", "Phase", "Smoothing", "Stream", "Window"]
