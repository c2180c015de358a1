"""What is settled before vLLM is started, without starting it."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from omni_common.errors import InvalidRequest
from omni_engine.vllm_args import cores_by_rank, plan_launch
from omni_engine.vllm_settings import VllmSettings


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "int8_per_token"])
def test_cache_dtypes_that_give_wrong_tokens_on_cpu_are_refused(dtype: str) -> None:
    with pytest.raises(ValidationError, match="wrong tokens on CPU"):
        VllmSettings(kv_cache_dtype=dtype)


def test_fp8_cache_with_latent_attention_is_refused_on_cpu(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({"kv_lora_rank": 512}))
    with pytest.raises(InvalidRequest, match="latent attention") as refused:
        plan_launch(VllmSettings(kv_cache_dtype="fp8"), model_dir, "m", "decode")
    assert refused.value.field == "vllm.kv_cache_dtype"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        plan_launch(VllmSettings(), tmp_path, "m", "decode")


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both")]
)
def test_leases_reach_the_connector_and_failed_pulls_are_recomputed(model_dir: Path, role: str, kv_role: str) -> None:
    plan = plan_launch(VllmSettings(lease_s=12), model_dir, "m", role)  # type: ignore[arg-type]
    transfer = plan.arguments["kv_transfer_config"]
    assert transfer["kv_role"] == kv_role
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert transfer["kv_connector_extra_config"]["kv_lease_duration"] == 12


@pytest.mark.parametrize(
    ("role", "settings", "kv_role"),
    [
        pytest.param("prefill", {}, "kv_producer", id="prefill only"),
        pytest.param("decode", {}, "kv_consumer", id="decode only"),
        pytest.param("both", {}, "", id="both"),
        pytest.param("decode", {"any_role": True}, "", id="any role"),
        pytest.param("decode", {"kv_connector": ""}, "", id="no connector"),
    ],
)
def test_an_engine_started_for_one_leg_says_so(
    model_dir: Path, role: str, settings: dict[str, object], kv_role: str
) -> None:
    plan = plan_launch(VllmSettings.model_validate(settings), model_dir, "m", role)  # type: ignore[arg-type]
    assert bool(plan.fixed_role) == bool(kv_role)
    assert kv_role in plan.fixed_role
    if kv_role:
        assert f"OMNI_{role.upper()}_VLLM__ANY_ROLE=true" in plan.fixed_role
    if "any_role" in settings:
        assert plan.arguments["kv_transfer_config"]["kv_role"] == "kv_both"


def test_an_engine_alone_needs_no_connector(model_dir: Path) -> None:
    assert "kv_transfer_config" not in plan_launch(VllmSettings(kv_connector=""), model_dir, "m", "decode").arguments


def test_two_engines_never_share_an_id_or_an_events_endpoint(model_dir: Path) -> None:
    one, other = (plan_launch(VllmSettings(), model_dir, "m", "decode") for _ in range(2))
    assert one.engine_id != other.engine_id
    assert one.events_endpoint != other.events_endpoint


def test_own_engine_arguments_win(model_dir: Path) -> None:
    plan = plan_launch(VllmSettings(engine_args={"max_num_seqs": 3, "seed": 9}), model_dir, "m", "decode")
    assert (plan.arguments["max_num_seqs"], plan.arguments["seed"]) == (3, 9)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", [[0]]), ("0-3", [[0, 1, 2, 3]]), ("0-1|4,6", [[0, 1], [4, 6]])],
)
def test_cores(text: str, cores: list[list[int]]) -> None:
    assert cores_by_rank(text) == cores


@pytest.mark.parametrize("text", ["", "a", "0-", "1|"])
def test_cores_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"vllm\.cores"):
        cores_by_rank(text)
