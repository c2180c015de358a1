"""Which expert-parallel engines are refused before vLLM is started, and what the others are started with."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from omni_common.errors import InvalidRequest
from omni_engine.vllm_args import plan_launch
from omni_engine.vllm_settings import VllmSettings

ALONE: dict[str, Any] = {"kv_connector": "", "kv_events": False}
TENSOR: dict[str, Any] = {"tensor_parallel_size": 2, "expert_parallel": True}
DATA: dict[str, Any] = {"data_parallel_size": 2, "expert_parallel": True, **ALONE}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 6}))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        pytest.param({"expert_parallel": True}, "of 2 or more", id="one rank"),
        pytest.param({"tensor_parallel_size": 2, "redundant_experts": 2}, "which is off", id="spare slots of nothing"),
        pytest.param({"data_parallel_size": 2, **ALONE}, "start more workers", id="data parallel only"),
        pytest.param(DATA | {"kv_events": True}, "set kv_connector to ''", id="block events of two caches"),
        pytest.param(DATA | {"kv_connector": "NixlConnector"}, "set kv_connector to ''", id="pulls from two caches"),
        pytest.param(TENSOR | {"platform": "ascend"}, "vllm-ascend's own", id="ascend"),
        pytest.param(TENSOR | {"enforce_eager": False}, "leave enforce_eager out", id="compiled on CPU"),
    ],
)
def test_modes_that_cannot_be_are_refused(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        VllmSettings(**settings)


@pytest.mark.parametrize(
    ("config", "settings", "field", "names"),
    [
        pytest.param({}, TENSOR, "expert_parallel", "has no experts", id="dense"),
        pytest.param(
            {"num_experts": 6}, TENSOR | {"redundant_experts": 3}, "redundant_experts", "evenly over 2", id="uneven"
        ),
        pytest.param(
            {"num_experts": 6},
            TENSOR | {"redundant_experts": 8},
            "redundant_experts",
            "7 slots per rank",
            id="too many",
        ),
        pytest.param(
            {"n_routed_experts": 6, "quantization_config": {"bits": 8}},
            TENSOR,
            "expert_parallel",
            "quantized",
            id="int8",
        ),
        pytest.param({"num_experts": 6}, TENSOR | {"cores": "2-3"}, "cores", "there are 2", id="cores of one rank"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], field: str, names: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match=names) as refused:
        plan_launch(VllmSettings(**settings), tmp_path, "m", "both")
    assert refused.value.field == f"vllm.{field}"


def test_every_expert_on_every_rank_is_the_most(model_dir: Path) -> None:
    plan = plan_launch(VllmSettings(**TENSOR, redundant_experts=6, cores="2|3"), model_dir, "m", "both")
    assert plan.arguments["enable_expert_parallel"]
    assert plan.arguments["enforce_eager"]
    assert plan.environment["OMNI_ENGINE_EXPERTS"] == "1"


def test_without_expert_parallelism_nothing_in_vllm_is_changed(model_dir: Path) -> None:
    plan = plan_launch(VllmSettings(), model_dir, "m", "both")
    assert not plan.arguments["enable_expert_parallel"]
    assert "OMNI_ENGINE_EXPERTS" not in plan.environment
