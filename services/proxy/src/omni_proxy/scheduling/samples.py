"""Fleets and requests for trials of plug-ins: random ones from a seed, and large ones for timing."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import numpy as np

from omni_common.errors import Unavailable
from omni_proxy.scheduling.decision import eligible
from omni_proxy.scheduling.request import SchedulingRequest, Slo
from omni_proxy.scheduling.view import FixedTimes, FleetView, WorkerRow, view_of

_HOSTS, _ZONES = 5, 2
_RANGES = ("", "0-1000", "1000-", "nonsense")


@dataclass(frozen=True, slots=True)
class Sample:
    request: SchedulingRequest
    view: FleetView

    @property
    def can_decode(self) -> bool:
        try:
            eligible(self.request, self.view)
        except Unavailable:
            return False
        return True

    def of_session(self, number: int) -> "Sample":
        """The same question from a session, a tenant and an adapter of that number."""
        request = replace(
            self.request, session=f"session-{number}", tenant=f"tenant-{number}", adapter=f"adapter-{number}"
        )
        return replace(self, request=request)


def samples(seed: int, count: int) -> Iterator[Sample]:
    """Fleets of up to twelve workers, many with nobody for one of the legs."""
    draw = random.Random(seed)
    for _ in range(count):
        view = view_of([_row(draw, number) for number in range(draw.randrange(13))], pair_ms=draw.choice([0.0, 5.0]))
        request = _request(draw, view)
        yield Sample(request, view if request.adapter else _of_the_model(view))


def _of_the_model(view: FleetView) -> FleetView:
    """As it is for a request that names no adapter."""
    return replace(view, has_adapter=np.ones(len(view), np.bool_), adapter_ms=np.zeros(len(view)))


def large_sample(size: int) -> Sample:
    """Half of the workers prefill, half decode, all of one connector; names in no order."""
    draw = random.Random(size)
    rows = [_row(draw, number) for number in range(size)]
    for number, row in enumerate(rows):
        row.prefills, row.decodes, row.connector, row.group = number % 2 == 0, number % 2 == 1, "c", ""
    request = SchedulingRequest(3000, session="s", adapter="a", slo=Slo(1000.0, 50.0))
    return Sample(request, view_of(rows))


def no_workers() -> Sample:
    return Sample(SchedulingRequest(100), view_of([]))


def frozen(view: FleetView) -> None:
    """Make writing to its arrays an error."""
    for name in _array_names(view):
        getattr(view, name).flags.writeable = False
    if isinstance(view.times, FixedTimes):
        for name in _array_names(view.times):
            getattr(view.times, name).flags.writeable = False


def marks_of(view: FleetView) -> tuple[bytes, ...]:
    """Equal while nothing of the view has changed."""
    parts = [getattr(view, name).tobytes() for name in _array_names(view)]
    if isinstance(view.times, FixedTimes):
        parts += [getattr(view.times, name).tobytes() for name in _array_names(view.times)]
    return (*parts, repr((view.ids, view.connectors, view.groups, [dict(own) for own in view.labels])).encode())


def _array_names(value: FleetView | FixedTimes) -> list[str]:
    return [part.name for part in fields(value) if isinstance(getattr(value, part.name), np.ndarray)]


def _row(draw: random.Random, number: int) -> WorkerRow:
    some, has_adapter = draw.choice([0, 0, 1, 3, 40]), draw.random() < 0.5
    is_large = draw.random() < 0.5
    return WorkerRow(
        f"w{(number * 7919) % 1009:04}-{number}",
        prefills=draw.random() < 0.5,
        decodes=draw.random() < 0.5,
        connector=draw.choice(["c", "c", "c", "d", ""]),
        group=draw.choice(["", "", "g", "h"]),
        labels=MappingProxyType(_labels(draw)),
        cached_tokens=draw.choice([0, 0, 64, 2048, 1_000_000]),
        expected_tokens=draw.choice([0, 64]),
        loadable_tokens=draw.choice([0, 512]),
        load_ms=draw.choice([0.0, 12.5]),
        has_adapter=has_adapter,
        adapter_ms=0.0 if has_adapter else draw.choice([0.0, 30.0]),
        own_requests=some,
        own_prefills=min(some, draw.randrange(4)),
        own_uncached_tokens=some * draw.randrange(4000),
        own_output_tokens=some * 100,
        dispatched=draw.randrange(1000),
        others_prefills=draw.choice([0, 2]),
        others_uncached_tokens=draw.choice([0, 9000]),
        others_sequences=draw.choice([0, 5, 300]),
        running=draw.choice([0, 8, 256]),
        waiting=draw.choice([0, 0, 9]),
        kv_usage=draw.choice([0.0, draw.random(), 1.0]),
        context_tokens=draw.choice([0, 100_000]),
        max_num_seqs=draw.choice([0, 8, 256]),
        stats_age_s=draw.choice([0.0, 0.05, 3600.0]),
        queue_ms=draw.choice([0.0, draw.uniform(0, 30_000)]),
        prefill_ms=draw.uniform(0, 3000),
        step_ms=draw.uniform(0, 100),
        stall_ms=draw.uniform(0, 3000),
        seat_ms=draw.choice([0.0, draw.uniform(0, 5000)]),
        confidence=draw.random() if is_large else draw.choice([0.0, 1.0]),
    )


def _labels(draw: random.Random) -> dict[str, str]:
    labels = {
        "omni.host": f"h{draw.randrange(_HOSTS)}",
        "omni.zone": f"z{draw.randrange(_ZONES)}",
        "omni.prompt_tokens": draw.choice(_RANGES),
    }
    return {key: value for key, value in labels.items() if draw.random() < 0.7}


def _request(draw: random.Random, view: FleetView) -> SchedulingRequest:
    may_prefill = draw.random() < 0.8
    held_by = None if may_prefill or not view.ids else draw.choice([None, *view.ids, "gone"])
    return SchedulingRequest(
        prompt_tokens=draw.choice([0, 1, 64, 900, 2048, 100_000]),
        may_prefill=may_prefill,
        kv_connector=None if may_prefill else draw.choice([None, "c", "d"]),
        held_by=held_by,
        excluded=frozenset(worker for worker in view.ids if draw.random() < 0.15),
        output_tokens=draw.choice([0, 1, 1000]),
        slo=draw.choice([Slo(), Slo(500.0, 30.0), Slo(None, 1.0)]),
        waited_ms=draw.choice([0.0, 700.0]),
        session=draw.choice(["", f"s{draw.randrange(9)}"]),
        adapter=draw.choice(["", "a", "z"]),
        tenant=draw.choice(["", "t"]),
        priority=draw.choice([-10, 0, 10]),
    )
