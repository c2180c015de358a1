"""Compiles, or loads from numba's cache, what choices run: about two seconds on a machine's first start."""

from dataclasses import replace

import numpy as np

from omni_proxy.scheduling.columns import Columns
from omni_proxy.scheduling.cost import CostPolicy
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.times import Capacity, WorkerTimes
from omni_proxy.scheduling.view import WorkerRow, view_of


def warm_up() -> None:
    """Choose for a prompt and for its decode leg among a few workers, so that the first request does not wait."""
    columns = Columns()
    times, slots = WorkerTimes(columns), np.array([columns.slot(str(number)) for number in range(4)], np.intp)
    for slot in slots:
        times.join(int(slot), Capacity("warm", "warm"))
    rows = [WorkerRow(str(slot), prefills=slot < 2, decodes=slot >= 2) for slot in slots]
    view = replace(view_of(rows), times=times.of(slots, 0.0, 8, 8, np.full(len(rows), 8)))
    times.begins_in_a_step(slots, 8, 0.5)
    times.have_seats(slots, 8)
    CostPolicy().choose(SchedulingRequest(8), view)
    CostPolicy().choose(SchedulingRequest(8, may_prefill=False, kv_connector="c", held_by="0"), view)
