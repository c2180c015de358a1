"""The service through its wire."""

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.errors import FailedPrecondition, Internal, InvalidRequest
from omni_placement.app import running
from omni_placement.load.book import GroupName
from omni_placement.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))

from placement_client import DEADLINE_S, refused, service

TOPOLOGY = pb.Topology(num_layers=1, num_experts=4, num_ranks=2, slots_per_rank=2)
CONFIGURED = {"num_layers": 1, "num_experts": 4, "num_ranks": 2, "slots_per_rank": 2}


def load(*tokens: int) -> pb.ExpertLoad:
    return pb.ExpertLoad(num_layers=1, num_experts=len(tokens), tokens=tokens)


async def plan(stub: Any, **fields: Any) -> pb.PlanResponse:
    answer: pb.PlanResponse = await stub.Plan(pb.PlanRequest(**{"model": "m", **fields}), timeout=DEADLINE_S)
    return answer


async def test_plan_publish_get() -> None:
    async with service() as stub:
        missing = await refused(stub.GetLayout(pb.GetLayoutRequest(model="m"), timeout=DEADLINE_S))
        assert missing.code == "NOT_FOUND"
        draft = await plan(stub, topology=TOPOLOGY, load=load(9, 3, 0, 0), solver="identity")
        assert (draft.layout.layout_version, list(draft.balancedness)) == (0, [0.5])
        assert (draft.predicted_step_load, draft.current_step_load, draft.HasField("decision")) == (12, 0, False)
        assert len(draft.lower_bound) == 1 and 0 < draft.lower_bound[0] <= 12
        first = await plan(stub, topology=TOPOLOGY, solver="identity", publish=True)
        assert (first.layout.layout_version, first.layout.solver) == (1, "identity")
        second = await plan(stub, solver="round_robin", publish=True)
        got = await stub.GetLayout(pb.GetLayoutRequest(model="m"), timeout=DEADLINE_S)
        assert got.layout == second.layout
        assert (got.layout.layout_version, list(got.layout.physical_to_logical)) == (2, [0, 2, 1, 3])


async def test_reported_load_is_planned_with_over_a_sliding_window() -> None:
    async with service(load_windows=2) as stub:
        windows = [(1, (99, 0, 0, 0)), (2, (3, 1, 0, 0)), (3, (0, 0, 1, 1)), (3, (0, 0, 1, 1))]
        reports = [
            pb.ReportLoadRequest(model="m", worker_id="w", first_step=step, last_step=step, load=load(*tokens))
            for step, tokens in windows
        ]
        answer = await stub.ReportLoad(iter(reports), timeout=DEADLINE_S)
        assert answer.accepted_windows == 3
        planned = await plan(stub, topology=TOPOLOGY, solver="identity")
        assert list(planned.balancedness) == [3 / 4]
        known = await stub.GetLoad(pb.GetLoadRequest(model="m"), timeout=DEADLINE_S)
        (stream,) = known.loads
        assert (list(stream.load.tokens), stream.windows, stream.phase) == ([3, 1, 1, 1], 2, pb.PHASE_UNSPECIFIED)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"topology": pb.Topology(num_layers=1, num_experts=9, num_ranks=2, slots_per_rank=2)},
                     "topology.slots_per_rank", id="infeasible"),
        pytest.param({"topology": TOPOLOGY, "solver": "magic"}, "solver", id="unknown solver"),
        pytest.param({"topology": TOPOLOGY, "load": load(1, 2)}, "load", id="load of another shape"),
        pytest.param({"topology": TOPOLOGY, "load": pb.ExpertLoad(num_layers=1, num_experts=4, tokens=[1])},
                     "load.tokens", id="counts missing"),
        pytest.param({"topology": TOPOLOGY, "load": load(2**60, 0, 0, 0)}, "load.tokens", id="count too large"),
        pytest.param({"topology": TOPOLOGY, "model": ""}, "model", id="no model"),
    ],
)  # fmt: skip
async def test_unusable_plans_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    async with service() as stub:
        error = await refused(plan(stub, **fields))
        assert (error.code, error.field) == ("INVALID_ARGUMENT", field)


async def test_restart_keeps_layout_and_version(tmp_path: Path) -> None:
    values = {"state_dir": tmp_path, "models": {"org/m": CONFIGURED}}
    async with service(**values) as stub:
        assert (await _get(stub, "org/m")).layout_version == 1
        kept = (await plan(stub, model="org/m", solver="round_robin", publish=True)).layout
    async with service(**values) as stub:
        assert await _get(stub, "org/m") == kept
        assert (await plan(stub, model="org/m", publish=True)).layout.layout_version == 3
    changed = {"org/m": {**CONFIGURED, "slots_per_rank": 3}}
    async with service(state_dir=tmp_path, models=changed) as stub:
        layout = await _get(stub, "org/m")
        assert (layout.layout_version, layout.topology.slots_per_rank, layout.solver) == (4, 3, "identity")


async def test_unreadable_state_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"model": "m"}')
    with pytest.raises(Internal, match=r"m\.json"):
        async with service(state_dir=tmp_path):
            pass


async def test_two_services_do_not_share_their_state(tmp_path: Path) -> None:
    async with service(state_dir=tmp_path, models={"m": CONFIGURED}):
        with pytest.raises(FailedPrecondition, match="in use by another"):
            async with service(state_dir=tmp_path):
                pass
    async with service(state_dir=tmp_path) as stub:
        assert (await _get(stub, "m")).layout_version == 1


async def test_watch_sends_the_layout_in_force_and_later_ones() -> None:
    async with service(models={"m": CONFIGURED, "n": CONFIGURED}) as stub:
        everything = stub.WatchLayouts(pb.WatchLayoutsRequest(), timeout=DEADLINE_S)
        only_m = stub.WatchLayouts(pb.WatchLayoutsRequest(model="m"), timeout=DEADLINE_S)
        newer = stub.WatchLayouts(pb.WatchLayoutsRequest(model="m", after_version=1), timeout=DEADLINE_S)
        assert {_name(await everything.read()) for _ in "mn"} == {("m", 1), ("n", 1)}
        assert _name(await only_m.read()) == ("m", 1)
        await plan(stub, model="n", publish=True)
        await plan(stub, model="m", publish=True)
        assert [_name(await everything.read()) for _ in range(2)] == [("n", 2), ("m", 2)]
        assert _name(await only_m.read()) == ("m", 2)
        assert _name(await newer.read()) == ("m", 2)


async def test_slow_watch_skips_to_the_newest_and_ends_on_drain() -> None:
    settings = Settings.model_validate({"port": 0, "watch_queue": 2, "models": {"m": CONFIGURED}})
    async with running(settings, CollectorRegistry()) as placement:
        watch = placement.parts.layouts.watch("m", "", 0)
        assert (await anext(watch)).version == 1
        name = GroupName("m", "")
        layout = placement.parts.layouts.get(name).layout
        for _ in range(9):
            await placement.parts.layouts.publish(name, layout, "identity", "requested")
        seen = [(await anext(watch)).version]
        while seen[-1] != 10:
            seen.append((await anext(watch)).version)
        assert len(seen) <= 2 and seen == sorted(seen)
        await placement.drain()
        assert [published async for published in watch] == []


async def test_concurrent_publications_get_their_own_versions(tmp_path: Path) -> None:
    async with service(state_dir=tmp_path, models={"m": CONFIGURED}) as stub:
        plans = await asyncio.gather(*(plan(stub, publish=True) for _ in range(8)))
        assert sorted(p.layout.layout_version for p in plans) == list(range(2, 10))


async def test_number_of_models_is_bounded() -> None:
    async with service(models={"m": CONFIGURED}, max_groups=1) as stub:
        error = await refused(plan(stub, model="n", topology=TOPOLOGY, publish=True))
        assert error.code == "RESOURCE_EXHAUSTED"


async def test_module_serves_and_stops(tmp_path: Path) -> None:
    models = '{"m": {"num_layers": 1, "num_experts": 4, "num_ranks": 2, "slots_per_rank": 2}}'
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni_placement"),
        env={
            "OMNI_PLACEMENT_PORT": "0",
            "OMNI_PLACEMENT_STATE_DIR": str(tmp_path / "state"),
            "OMNI_PLACEMENT_MODELS": models,
        },
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            while b'"serving"' not in (line := await process.stderr.readline()):
                assert line, "ended before serving"
            assert b'"port": ' in line
            process.send_signal(signal.SIGTERM)
            await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    assert (tmp_path / "state" / "m.json").exists()


@pytest.mark.parametrize("environ", [{"OMNI_PLACEMENT_DEFAULT_SOLVER": "magic"}, {"OMNI_PLACEMENT_STATEDIR": "x"}])
def test_unusable_settings_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        Settings.load(environ)


async def _get(stub: Any, model: str) -> pb.Layout:
    return (await stub.GetLayout(pb.GetLayoutRequest(model=model), timeout=DEADLINE_S)).layout  # type: ignore[no-any-return]


def _name(response: pb.WatchLayoutsResponse) -> tuple[str, int]:
    return response.layout.model, response.layout.layout_version
