"""The systems that are compared, and running them side by side."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from omni_placement.economy import Costs, Rule
from omni_placement.layout import Topology
from omni_placement.load import LoadRules
from placementday.replay import Outcome, replay
from placementday.systems import Every, Never, Once, Oracle, Service, System
from placementday.traffic import TICK_S, Day

OURS, BOUND = "service", "oracle"
HOUR = int(3600 / TICK_S)
# Ticks of 30 s: every minute from the last minute; every 3,000 steps from the last 1,200.
MINUTE, STEPS_3000, WINDOW = 2, 5, 2

TITLES: Mapping[str, str] = {
    "never": "never",
    "static": "static pattern of the first hour, omni",
    "60s/greedy_lpt": "every 60 s, greedy_lpt",
    "60s/deepseek_eplb": "every 60 s, deepseek_eplb",
    "60s/omni": "every 60 s, omni",
    "3000/greedy_lpt": "every 3,000 steps, greedy_lpt",
    "3000/deepseek_eplb": "every 3,000 steps, deepseek_eplb",
    "3000/omni": "every 3,000 steps, omni",
    "service/forecast": "omni on the forecast every 60 s, no economy",
    "service/greedy_lpt": "service with greedy_lpt",
    "service/classes": "service that is told traffic classes",
    "service/spread": "service whose solver is told the forecast's spread",
    "service/bursts": "service that waits bursts out",
    OURS: "service (omni, forecast, economy)",
    "oracle/omni": "oracle with omni",
    BOUND: "oracle: greedy_lpt each minute, for that minute's load, free moves",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What every system is given alike."""

    day: Day
    topology: Topology
    costs: Costs


def system(name: str, costs: Costs) -> System:
    """A fresh system by its key in `TITLES`."""
    service = partial(Service, costs=costs, rules=LoadRules(), rule=Rule())
    special: Mapping[str, Callable[[], System]] = {
        "never": Never,
        "static": lambda: Once("omni", HOUR),
        "service/forecast": lambda: service("omni", economical=False),
        "service/greedy_lpt": lambda: service("greedy_lpt"),
        "service/classes": lambda: service("omni", by_class=True),
        "service/spread": lambda: service("omni", wary=True),
        "service/bursts": lambda: service("omni", rule=Rule(waits_out_bursts=True)),
        OURS: lambda: service("omni"),
        "oracle/omni": lambda: Oracle("omni", MINUTE),
        BOUND: lambda: Oracle("greedy_lpt", MINUTE),
    }
    if name in special:
        return special[name]()
    period, solver = name.split("/")
    return Every(solver, MINUTE if period == "60s" else STEPS_3000, WINDOW)


def run(scene: Scene, names: Sequence[str], jobs: int) -> dict[str, Outcome]:
    """Every system through the same day, each in a process of its own where `jobs` allows."""
    if jobs == 1:
        return {name: _one(scene, name) for name in names}
    with ProcessPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(partial(_one, scene), names), strict=True))


def _one(scene: Scene, name: str) -> Outcome:
    return replay(scene.day, scene.topology, system(name, scene.costs), scene.costs)
