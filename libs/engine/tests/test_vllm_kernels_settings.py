"""The setting `kernels`: what engines are started with, what is refused, and how its metric comes about."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from omni_common.errors import Unavailable
from omni_engine.hosting.kernels import KernelUsage
from omni_engine.hosting.metrics import KernelsCollector
from omni_engine.ports import KernelCalls
from omni_engine.sim import SimEngine
from omni_engine.sim.settings import SimSettings
from omni_engine.vllm_args import plan_launch
from omni_engine.vllm_kernels import summed
from omni_engine.vllm_settings import VllmSettings

ALONE: dict[str, Any] = {"kv_connector": "", "kv_events": False}
Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 6}))
    return tmp_path


def started_with(model_dir: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
    plan = plan_launch(VllmSettings(**settings), model_dir, "m", "both")
    kernels = {name: value for name, value in plan.environment.items() if name.startswith("OMNI_ENGINE_")}
    return plan.arguments, kernels


def test_by_default_engines_are_told_nothing_of_our_kernels(model_dir: Path) -> None:
    arguments, environment = started_with(model_dir)
    assert "ir_op_priority" not in arguments
    assert not {"OMNI_ENGINE_KERNELS", "OMNI_ENGINE_PLATFORM"} & environment.keys()


def test_engines_are_told_the_parts_and_the_platform(model_dir: Path) -> None:
    arguments, environment = started_with(model_dir, kernels="omni:routing,norms")
    assert arguments["ir_op_priority"]["rms_norm"] == ["omni", "native"]
    assert environment["OMNI_ENGINE_KERNELS"] == "norms,routing"
    assert environment["OMNI_ENGINE_PLATFORM"] == "cpu"


def test_the_twin_is_set_up_as_a_cpu_is(model_dir: Path) -> None:
    arguments, environment = started_with(model_dir, platform="twin", kernels="omni", cores="0-1")
    assert environment["OMNI_ENGINE_PLATFORM"] == "twin"
    assert arguments["kv_cache_memory_bytes"] == 1 << 30
    assert arguments["kv_transfer_config"]["kv_buffer_device"] == "cpu"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"kernels": "triton"}, "must be vllm, omni or"),
        ({"platform": "twin"}, "cannot do without"),
        ({"platform": "ascend", "kernels": "omni:routing"}, "on ascend the parts are norms"),
        ({"kernels": "omni:attention", "kv_cache_dtype": "fp8"}, "kv_cache_dtype must be auto"),
        (
            {"kernels": "omni:experts", "data_parallel_size": 2, "expert_parallel": True, **ALONE},
            "no part in gathering its tokens",
        ),
        (
            {"platform": "twin", "kernels": "omni", "tensor_parallel_size": 2, "expert_parallel": True},
            "the twin has one rank",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        VllmSettings(**settings)


def test_calls_of_all_ranks_are_added_up() -> None:
    ranks: list[KernelCalls] = [{"a": {"cpu": 1}, "b": {"meaning": 2}}, {"a": {"cpu": 3, "meaning": 4}}]
    assert summed(ranks) == {"a": {"cpu": 4, "meaning": 4}, "b": {"meaning": 2}}


class CountingEngine(SimEngine):
    """Says how often it was asked; not at all the second time."""

    asked = 0

    async def kernel_calls(self) -> KernelCalls | None:
        self.asked += 1
        if self.asked == 2:
            raise Unavailable("busy", reason="engine_dead")
        return {"rms_norm": {"cpu": self.asked}}


async def test_the_metric_follows_the_engine_and_survives_a_reading_that_fails(until: Until) -> None:
    usage = KernelUsage(CountingEngine(SimSettings(), "m"), interval_s=0.001)
    registry = CollectorRegistry()
    registry.register(KernelsCollector(lambda: usage.calls))

    def value() -> float:
        labels = {"op": "rms_norm", "backend": "cpu"}
        return registry.get_sample_value("omni_engine_kernel_calls_total", labels) or 0

    assert value() == 0
    reading = asyncio.create_task(usage.run())
    await until(lambda: value() >= 3)
    reading.cancel()


async def test_engines_on_their_own_kernels_are_asked_once() -> None:
    usage = KernelUsage(SimEngine(SimSettings(), "m"))
    await usage.run()
    assert usage.calls == {}
