"""What an attention pattern asks of vLLM, and what it is refused with, without starting vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest

from omni_common.errors import InvalidRequest
from omni_engine.vllm_args import plan_launch
from omni_engine.vllm_settings import VllmSettings
from omni_kernels.patterns.pattern import Budget, Layer, Pattern, write


def launch(folder: Path, layers: tuple[Layer, ...], config: dict[str, Any] | None = None, **settings: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2} | (config or {})))
    file = folder / "pattern.json"
    write(Pattern("m", settings.pop("found_for", 64), 512, layers), file)
    return plan_launch(VllmSettings(attention_pattern=file, **settings), folder, "m", "decode")


def test_layers_blocks_and_connector_reach_vllm(tmp_path: Path) -> None:
    plan = launch(tmp_path, (None, Budget(1, 2)))
    assert plan.arguments["block_size"] == 64
    assert plan.arguments["additional_config"]["omni_attention_pattern"]["layers"][1]["recent_blocks"] == 2
    assert plan.arguments["kv_transfer_config"]["kv_connector"] == "SinkRecentNixlConnector"
    assert plan.arguments["kv_transfer_config"]["kv_connector_extra_config"]["kv_lease_duration"] == 30


def test_engines_that_differ_in_a_layer_know_it(tmp_path: Path) -> None:
    digests = {launch(tmp_path, layers).pattern for layers in [(None, Budget(1, 2)), (None, Budget(1, 3))]}
    digests |= {launch(tmp_path, (None, Budget(1, 2)), found_for=32).pattern, launch(tmp_path, (None, None)).pattern}
    assert len(digests) == 4


def test_a_pattern_that_keeps_everything_changes_nothing(tmp_path: Path) -> None:
    plan = launch(tmp_path, (None, None))
    assert plan.pattern is None
    assert "worker_cls" not in plan.arguments
    assert plan.arguments["kv_transfer_config"]["kv_connector"] == "NixlConnector"


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        pytest.param({"num_hidden_layers": 3}, {}, "2 layers, the model has 3", id="layers"),
        pytest.param({"kv_lora_rank": 512}, {}, "latent attention", id="latent attention"),
        pytest.param({"use_sliding_window": True}, {}, "full attention", id="sliding window"),
        pytest.param({"layer_types": ["full_attention", "linear_attention"]}, {}, "full attention", id="hybrid"),
        pytest.param({}, {"block_size": 128}, "blocks of 64", id="block size"),
        pytest.param({}, {"found_for": 48}, "multiples of 32", id="odd block size"),
        pytest.param({}, {"platform": "cuda"}, "cuda", id="platform"),
        pytest.param({"num_nextn_predict_layers": 1}, {"speculative": "mtp:1"}, "ngram", id="prediction layer"),
    ],
)
def test_models_and_settings_it_does_not_fit_are_refused(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named) as refused:
        launch(tmp_path, (None, Budget(1, 2)), config, **settings)
    assert refused.value.field == "vllm.attention_pattern"


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_a_file_that_is_no_pattern_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    file = tmp_path / "pattern.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidRequest, match=r"pattern\.json"):
        plan_launch(VllmSettings(attention_pattern=file), tmp_path, "m", "decode")
