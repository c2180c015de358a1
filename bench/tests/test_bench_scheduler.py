import asyncio
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fleetsim.bounds import least_work_s, most_kept, unreachable
from fleetsim.compare import Runner, served_speed
from fleetsim.constants import PREFILL, EngineModel
from fleetsim.engine import Engine
from fleetsim.leg import Leg
from fleetsim.outcome import outcome_of
from fleetsim.plot import svg
from fleetsim.record import Served, weighted_quantile
from fleetsim.report import Fleet, as_json, blocks_of, goals
from fleetsim.simulation import Scene, simulate
from fleetsim.slo import FIXED, SCALED
from fleetsim.systems import SYSTEMS
from sidebyside.tables import markdown
from tracereplay.clock import Clock
from tracereplay.trace import BLOCK_TOKENS, Request, chained

from omni_engine.ports import DecodeJob, SamplingParams, SequenceOutput
from omni_engine.sim import SimEngine, SimSettings, Timing, VirtualClock


def conversations(users: int, turns: int, gap_s: float) -> list[Request]:
    """Every turn repeats the one before and adds four blocks; all begin with the same block."""
    requests = []
    for turn in range(turns):
        for user in range(users):
            ids = [0, *(1 + user * 1000 + block for block in range(4 * (turn + 1)))]
            at_s = turn * gap_s + user * gap_s / users
            requests.append(Request(at_s, len(ids) * BLOCK_TOKENS - 12, 1 + (7 * user) % 60, chained(ids)[:-1]))
    return requests


TRACE = conversations(users=24, turns=4, gap_s=5.0)
SMALL = Scene(prefills=2, decodes=2, spread_s=0.5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_request_ends_once_and_nothing_is_left(name: str) -> None:
    run = simulate(SMALL, SYSTEMS[name], TRACE)
    assert len(run.served) == len(TRACE)
    assert all(one.ends == 1 and 0 < one.ttft_s <= one.ended_s for one in run.served)
    assert sorted(one.prompt_tokens for one in run.served) == sorted(request.input_tokens for request in TRACE)
    assert all(sum(count for count, _ in one.gaps) == one.output_tokens - 1 for one in run.served)
    assert all(gap_s > 0 for one in run.served for count, gap_s in one.gaps if count)
    assert (run.leaked_blocks, run.charged) == (0, 0)


@pytest.mark.parametrize("name", ["cost", "power_of_two", "round_robin/hold"])
@pytest.mark.parametrize("proxies", [1, 3])
def test_a_seed_gives_the_same_run_again(name: str, proxies: int) -> None:
    scene = replace(SMALL, proxies=proxies, slow=((0, 1.5),), seed=5)

    def figures(seed: int) -> list[Served]:
        return list(simulate(replace(scene, seed=seed), SYSTEMS[name], TRACE).served)

    assert figures(5) == figures(5)
    assert figures(5) != figures(6)


def test_every_system_meets_the_same_arrivals() -> None:
    runs = [simulate(SMALL, SYSTEMS[name], TRACE).served for name in ("cost", "round_robin", "cost/no-hold")]
    arrivals = [sorted((one.arrived_s, one.prompt_tokens) for one in served) for served in runs]
    assert arrivals[0] == arrivals[1] == arrivals[2]


def test_who_holds_sends_to_idle_engines() -> None:
    dense = [replace(request, at_s=request.at_s / 4) for request in TRACE]
    held, plain = (simulate(SMALL, SYSTEMS[name], dense).served for name in ("cost", "cost/no-hold"))
    assert sum(one.hold_s for one in plain) == 0 < sum(one.hold_s for one in held)
    assert sum(one.queue_s for one in held) < sum(one.queue_s for one in plain)


def test_engines_reuse_what_they_computed() -> None:
    served = simulate(SMALL, SYSTEMS["cost"], TRACE).served
    assert sum(one.cached_tokens for one in served) > 0.3 * sum(one.prompt_tokens for one in served)
    assert sum(one.disaggregated for one in served) > len(served) / 2


def test_predictions_settle() -> None:
    outcome = outcome_of(simulate(SMALL, SYSTEMS["cost"], TRACE), FIXED)
    assert outcome.errors["prompt"].median < 0.15
    assert outcome.errors["transfer"].median < 0.15
    assert outcome.kept["fixed"] >= outcome.kept["strict"]


def plain(**changes: float) -> EngineModel:
    """Without noise, small enough for the other engine."""
    model = EngineModel(noise=0.0, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=1024)
    return replace(model, **changes)  # type: ignore[arg-type]


def ours(jobs: Sequence[tuple[float, int, int]], model: EngineModel) -> list[tuple[float, float]]:
    """First and last token of (arrival, prompt tokens, output tokens), in seconds."""
    clock = Clock()
    engine = Engine(clock, model, random.Random(0), lambda events: None)
    legs = [Leg(chained([n * 100 + b for b in range(p // BLOCK_TOKENS)]), p, o) for n, (_, p, o) in enumerate(jobs)]
    for leg, (at_s, _, _) in zip(legs, jobs, strict=True):
        clock.at(at_s, engine.take, leg)
    clock.run()
    assert engine.pool.num_available == model.num_blocks
    return [(leg.first_s, leg.ended_s) for leg in legs]


async def theirs(jobs: Sequence[tuple[float, int, int]], model: EngineModel) -> list[tuple[float, float]]:
    """The same of the simulated engine."""
    names = Timing.model_fields.keys() & set(EngineModel.__dataclass_fields__)
    settings = SimSettings.model_validate(
        {
            "block_size": BLOCK_TOKENS,
            "num_blocks": model.num_blocks,
            "max_model_len": model.num_blocks * BLOCK_TOKENS,
            "max_num_seqs": model.max_num_seqs,
            "max_num_batched_tokens": model.max_num_batched_tokens,
            "timing": {name: getattr(model, name) for name in names},
        }
    )
    clock = VirtualClock()
    engine = SimEngine(settings, clock=clock)
    driver = asyncio.create_task(clock.run())
    await engine.start()
    times: list[list[float]] = [[] for _ in jobs]
    done = asyncio.Event()

    async def run(number: int) -> None:
        at_s, prompt, output = jobs[number]
        await clock.sleep(at_s)

        def sink(outputs: Sequence[SequenceOutput]) -> None:
            for one in outputs:
                times[int(one.request_id)].extend([clock.now_s()] * len(one.token_ids))
            if all(len(seen) == job[2] for seen, job in zip(times, jobs, strict=True)):
                done.set()

        tokens = [(number * 7919 + t) % 50_000 for t in range(prompt)]
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        await engine.submit(DecodeJob(str(number), tokens, sampling), sink)

    tasks = [asyncio.create_task(run(number)) for number in range(len(jobs))]
    await done.wait()
    await asyncio.gather(*tasks)
    driver.cancel()
    await engine.close()
    return [(seen[0], seen[-1]) for seen in times]


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param([(0.0, 700, 40)], id="one"),
        pytest.param([(0.0, 3000, 2), (0.0, 2500, 2), (0.05, 900, 2)], id="prompts in order"),
        pytest.param([(0.0, 500, 300), (1.0, 400, 150), (2.5, 300, 250)], id="decode joins and leaves"),
        pytest.param([(0.0, 600, 200), (0.8, 2600, 60), (1.3, 900, 90)], id="prompts beside decode"),
        pytest.param([(0.1 * n, 300 + 90 * n, 30 + 11 * n) for n in range(12)], id="more than seats"),
    ],
)
async def test_times_are_those_of_the_simulated_engine(jobs: list[tuple[float, int, int]]) -> None:
    expected = np.array(await theirs(jobs, plain()))
    assert np.array(ours(jobs, plain())) == pytest.approx(expected, rel=0.02)


def test_gaps_tell_of_a_prompt_computed_beside_them() -> None:
    clock, model = Clock(), plain()
    engine = Engine(clock, model, random.Random(0), lambda events: None)
    decoding, beside = Leg([], 600, 100), Leg([], 1000, 1)
    clock.at(0.0, engine.take, decoding)
    clock.at(1.0, engine.take, beside)
    clock.run()
    assert sum(count for count, _ in decoding.gaps) == 99
    assert sum(count * gap_s for count, gap_s in decoding.gaps) == pytest.approx(decoding.ended_s - decoding.first_s)
    stall_s = max(gap_s for _, gap_s in decoding.gaps)
    prompt_s = model.prompt_ms([(1000, 1000)]) / 1e3
    assert stall_s == pytest.approx(prompt_s + model.step_base_ms / 1e3, rel=0.02)
    assert weighted_quantile(decoding.gaps, 1.0) == stall_s > 2 * weighted_quantile(decoding.gaps, 0.5)


def test_blocks_wait_for_their_pull() -> None:
    clock, model = Clock(), plain()
    prefill, decode = (Engine(clock, model, random.Random(0), lambda events: None) for _ in range(2))
    keys = chained([1, 2])
    first = Leg(keys, 1100, 1, keeps_blocks=True)
    clock.at(0.0, prefill.take, first)
    clock.run()
    assert prefill.pool.num_available == model.num_blocks - 3
    second = Leg(keys, 1100, 20, pulls=True, on_pulled=lambda leg: prefill.release(first))
    clock.at(1.0, decode.take, second)
    clock.run()
    assert prefill.pool.num_available == decode.pool.num_available == model.num_blocks
    assert second.transfer_s == pytest.approx(model.transfer_s(1100))
    again = Leg(keys, 1100, 2)
    decode.take(again)
    clock.run()
    assert again.cached == 1024


def test_promises() -> None:
    served = Served(0.0, 100, 3, unloaded_s=2.0, ttft_s=5.5, ended_s=6.0, gaps=[(1, 0.08), (1, 0.01)])
    assert not FIXED.kept(served)
    assert SCALED.kept(served)
    assert not SCALED.kept(replace(served, gaps=[(1, 0.08), (1, 0.03)]))
    assert FIXED.of(5000).ttft_ms == 5000
    assert SCALED.of(8192).ttft_ms == pytest.approx(2000 + 2 * PREFILL.unloaded_s(8192) * 1e3)


def test_bounds_hold_for_what_was_run() -> None:
    dense = [replace(request, at_s=request.at_s / 4) for request in TRACE]
    bound = most_kept(dense, FIXED, SMALL.prefills + SMALL.decodes)
    for name in ("cost", "round_robin"):
        outcome = outcome_of(simulate(replace(SMALL, spread_s=0.0), SYSTEMS[name], dense), FIXED)
        assert outcome.kept["fixed"] <= bound + 1e-9
    assert most_kept(dense, FIXED, 1) <= most_kept(dense, FIXED, 2) <= 1 - unreachable(dense, FIXED)
    work_s = least_work_s(TRACE)
    assert sum(work_s) < sum(PREFILL.unloaded_s(request.input_tokens) for request in TRACE)
    longest = [Request(0.0, 120_000, 1, ())]
    assert unreachable(longest, FIXED) == 1.0


@pytest.mark.parametrize(
    ("kept", "speed"),
    [
        pytest.param([0.99, 0.95, 0.85], 2.5, id="between"),
        pytest.param([0.8, 0.7, 0.6], 1.0, id="never"),
        pytest.param([0.99, 0.98, 0.97], 3.0, id="always"),
    ],
)
def test_served_speed(kept: list[float], speed: float) -> None:
    assert served_speed([1.0, 2.0, 3.0], kept) == pytest.approx(speed)


def test_report_holds_cost_against_the_best_other(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": r.at_s * 1e3, "input_length": r.input_tokens, "output_length": r.output_tokens, "hash_ids": [n]}
        for n, r in enumerate(TRACE[:40])
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    systems = ["cost", "round_robin", "least_loaded"]
    with Runner(path, None, jobs=1) as runner:
        levels = runner.levels(SMALL, {"knee": 1.0}, systems, seeds=2)
        sweep = runner.sweep(SMALL, ["cost", "round_robin"], [1.0, 4.0])
    assert all(len(outcomes) == 2 for outcomes in levels[0].outcomes.values())
    bounds = {"knee": {"unreachable": 0.0, "prefill": 1.0, "all": 1.0}}
    fleet = Fleet("2P2D", 1.0, levels, [1.0, 4.0], sweep, bounds)
    assert len(goals(fleet)) == 6
    assert "round_robin" in markdown(blocks_of([fleet]), goals(fleet))
    assert svg([fleet]).startswith("<svg")
    json.dumps(as_json([fleet]))


def test_an_idle_engine_takes_the_time_of_its_steps() -> None:
    assert math.isclose(PREFILL.unloaded_s(8192) * 1e3, PREFILL.prompt_ms([(8192, 8192)]))
