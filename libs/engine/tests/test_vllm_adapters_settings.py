"""Adapters on vLLM, before it is started: what it is told of them, and which are refused."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from omni_common.errors import InvalidRequest
from omni_engine.vllm_args import LaunchPlan, plan_launch
from omni_engine.vllm_cpu_fixes import FIXES_VARIABLE, install
from omni_engine.vllm_settings import VllmSettings

EXPERTS = {"num_experts": 4}
SHAPES = {"q_proj": (64, 32), "k_proj": (32, 32), "o_proj": (32, 64), "kv_b_proj": (64, 32)}
FIRST = "layers.0.self_attn.q_proj"


def weights_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file whose header alone is there to be read."""
    described = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps(described | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def model(folder: Path, **config: Any) -> Path:
    """Two layers of attention, and one beside them."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    layers = {f"model.layers.{n}.self_attn.{name}.weight": shape for n in (0, 1) for name, shape in SHAPES.items()}
    weights_file(folder / "model" / "model.safetensors", layers | {"vision.merger.weight": (32, 16)})
    return folder / "model"


def lora(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    name = f"base_model.model.model.{module}"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def adapter(
    folder: Path, name: str = "sql", modules: Mapping[str, tuple[int, int]] | None = None, **config: Any
) -> Path:
    """`modules`: name -> (out, in); of the model's first layer unless they say more. Ranks by a module's last name."""
    (folder / name).mkdir()
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / name / "adapter_config.json").write_text(json.dumps(described))
    shapes = {}
    for module, (wide, narrow) in (modules or {FIRST: SHAPES["q_proj"]}).items():
        rank = described.get("rank_pattern", {}).get(module.rpartition(".")[2], described["r"])
        shapes |= lora(module, (rank, narrow), (wide, rank))
    weights_file(folder / name / "adapter_model.safetensors", shapes, "F32")
    return folder / name


def plan(folder: Path, *adapters: Path, model_config: Mapping[str, Any] = EXPERTS, **settings: Any) -> LaunchPlan:
    dirs = {path.name: path for path in adapters}
    return plan_launch(VllmSettings.model_validate(settings), model(folder, **model_config), "m", "both", dirs)


def test_without_adapters_vllm_is_told_nothing(tmp_path: Path) -> None:
    told = plan(tmp_path)
    assert not any("lora" in name for name in told.arguments)
    assert "adapter" not in told.environment.get(FIXES_VARIABLE, "")


def test_what_vllm_is_told(tmp_path: Path) -> None:
    small = adapter(tmp_path, "small")
    output = {"layers.1.self_attn.o_proj": SHAPES["o_proj"], "lm_head": (9, 32)}
    large = adapter(tmp_path, "large", output, r=12, rank_pattern={"lm_head": 20})
    told = plan(tmp_path, small, large)
    assert told.arguments["enable_lora"] is True
    assert (told.arguments["max_loras"], told.arguments["max_cpu_loras"]) == (2, 2)
    assert told.arguments["max_lora_rank"] == 32, "the smallest that fits"
    assert told.arguments["lora_target_modules"] == ["lm_head", "o_proj", "q_proj"]
    assert [(one.name, one.number) for one in told.adapters] == [("large", 1), ("small", 2)]
    assert all(one.path.is_absolute() for one in told.adapters)
    assert told.adapter_slots == 2


@pytest.mark.parametrize(("asked", "slots"), [(1, 1), (2, 2), (9, 2), (None, 2)])
def test_slots(tmp_path: Path, asked: int | None, slots: int) -> None:
    told = plan(tmp_path, adapter(tmp_path, "a"), adapter(tmp_path, "b"), adapter_slots=asked)
    assert told.arguments["max_loras"] == told.adapter_slots == slots


@pytest.mark.parametrize(
    ("config", "platform", "fixes"),
    [
        pytest.param(EXPERTS, "cpu", {"adapter_ops", "adapters_beside_experts"}, id="experts"),
        pytest.param({}, "cpu", {"adapter_ops"}, id="dense"),
        pytest.param(EXPERTS, "cuda", set(), id="cuda"),
    ],
)
def test_cpu_engines_get_the_fixes(tmp_path: Path, config: dict[str, Any], platform: str, fixes: set[str]) -> None:
    told = plan(tmp_path, adapter(tmp_path), model_config=config, platform=platform)
    named = told.environment.get(FIXES_VARIABLE, "").split(",")
    assert {name for name in named if name.startswith("adapter")} == fixes


EXPERT = {"layers.0.mlp.experts.3.up_proj": (16, 32)}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        pytest.param({"r": 513}, "r in adapter_config.json must be from 1 to 512", id="rank"),
        pytest.param({"r": 8, "rank_pattern": {"q_proj": 600}}, "must be from 1 to 512", id="rank of a layer"),
        pytest.param({"r": True}, "must be from 1 to 512", id="rank that is none"),
        pytest.param({"rank_pattern": {"k_proj": True}}, "must be from 1 to 512", id="rank of a layer that is none"),
        pytest.param({"rank_pattern": {"(": 4}}, "rank_pattern .* no regular expression", id="rank of no layer"),
        pytest.param({"use_dora": True}, "vLLM does not support use_dora", id="DoRA"),
        pytest.param({"modules_to_save": ["embed_tokens"]}, "does not support modules_to_save", id="whole layers"),
        pytest.param({"bias": "all"}, "LoRA without biases", id="biases"),
        pytest.param({"peft_type": "IA3"}, "only LoRA", id="no LoRA"),
        pytest.param({"modules": EXPERT}, "weights for experts", id="experts"),
        pytest.param(
            {"modules": {"layers.2.self_attn.q_proj": (64, 32)}},
            r"the model has no layer layers\.2\.self_attn\.q_proj",
            id="more layers",
        ),
        pytest.param(
            {"modules": {"layers.0.self_attn.q_proj": (64, 16)}},
            "is 64 x 16 in it and 64 x 32 in the model",
            id="width",
        ),
        pytest.param({"modules": {"bogus": (64, 32)}}, "the model has no layer bogus", id="another layer"),
        pytest.param({"modules": {"bogus.q_proj": (64, 32)}}, r"no layer bogus\.q_proj", id="another layer's end"),
    ],
)
def test_refused_adapters(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"adapters: 'sql': .*{why}") as refused:
        plan(tmp_path, adapter(tmp_path, **given))
    assert refused.value.field == "adapters"


A, B = lora(FIRST, (4, 32), (64, 4)).items()


@pytest.mark.parametrize(
    ("shapes", "dtype", "why"),
    [
        pytest.param([A], "F32", "has lora_A alone of", id="A alone"),
        pytest.param([B], "F32", "has lora_B alone of", id="B alone"),
        pytest.param(lora(FIRST, (4, 32), (64, 2)), "F32", "rank 4 in its lora_A and 2 in its lora_B", id="two ranks"),
        pytest.param(lora(FIRST, (8, 32), (64, 8)), "F32", r"rank 8, and 4 by adapter_config", id="another rank"),
        pytest.param(lora(FIRST, (2, 32), (64, 2)), "F32", r"rank 2, and 4 by adapter_config", id="a lower rank"),
        pytest.param([A, B], "I8", "is I8, and must be of floats", id="integers"),
        pytest.param([A, B], "BOOL", "is BOOL, and must be of floats", id="booleans"),
        pytest.param(lora(FIRST, (), ()), "F32", "has 0 dimensions, and must have two", id="numbers"),
        pytest.param(lora(FIRST, (4,), (4,)), "F32", "has 1 dimensions, and must have two", id="vectors"),
        pytest.param(lora(FIRST, (4, 32, 1), (64, 4)), "F32", "has 3 dimensions", id="more than matrices"),
    ],
)
def test_refused_weights(tmp_path: Path, shapes: Any, dtype: str, why: str) -> None:
    folder = adapter(tmp_path)
    weights_file(folder / "adapter_model.safetensors", dict(shapes), dtype)
    with pytest.raises(InvalidRequest, match=f"adapters: 'sql': .*{why}") as refused:
        plan(tmp_path, folder)
    assert refused.value.field == "adapters"


@pytest.mark.parametrize(
    ("pattern", "module", "rank"),
    [
        pytest.param({}, FIRST, 4, id="none"),
        pytest.param({"q_proj": 8}, FIRST, 8, id="last name"),
        pytest.param({"_proj": 8}, FIRST, 4, id="no whole name"),
        pytest.param({r"layers\.[01]\..*": 8}, FIRST, 8, id="expression"),
        pytest.param({"q_proj": 8, "self_attn.q_proj": 2}, FIRST, 8, id="the first of two"),
        pytest.param({"self_attn": 8}, FIRST, 4, id="within"),
        pytest.param({}, "layers.0.mlp.experts", 12, id="stacked experts"),
        pytest.param({"gate_up_proj": 3}, "layers.0.mlp.experts.base_layer", 9, id="stacked experts by parameter"),
        pytest.param({"down_proj": 2}, "layers.0.mlp.experts", 6, id="others by theirs"),
    ],
)
def test_ranks_are_those_that_vllm_scales_by(tmp_path: Path, pattern: dict[str, int], module: str, rank: int) -> None:
    folder = adapter(tmp_path, rank_pattern=pattern)
    weights_file(folder / "adapter_model.safetensors", lora(module, (rank, 32), (64, rank)), "F32")
    assert plan(tmp_path, folder, platform="cuda").arguments["max_lora_rank"] == 8
    if importlib.util.find_spec("vllm"):
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_local_dir(str(folder), None)
        assert rank % helper.get_rank_and_scaling(f"model.{module}")[0] == 0
    weights_file(folder / "adapter_model.safetensors", lora(module, (rank + 1, 32), (64, rank + 1)), "F32")
    (tmp_path / "other").mkdir()
    with pytest.raises(InvalidRequest, match=f"has rank {rank + 1}, and"):
        plan(tmp_path / "other", folder, platform="cuda")


@pytest.mark.parametrize("name", ["vision.merger", "lm_head", "embed_tokens", FIRST])
def test_layers_that_the_model_has(tmp_path: Path, name: str) -> None:
    told = plan(tmp_path, adapter(tmp_path, modules={name: (64, 32)}))
    assert told.arguments["lora_target_modules"] == [name.rpartition(".")[2]]


def test_other_weights_are_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    own = {"base_model.model.model.embed_tokens.base_layer.weight": (9, 32)}
    one = lora(FIRST, (4, 32), (64, 4))
    weights_file(folder / "adapter_model.safetensors", own | one)
    told = plan(tmp_path, folder)
    assert told.arguments["lora_target_modules"] == ["q_proj"]
    (tmp_path / "other").mkdir()
    weights_file(
        folder / "adapter_model.safetensors", one | {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 9)}
    )
    with pytest.raises(InvalidRequest, match=r"embed_tokens\.lora_embedding_A in .* is not LoRA of a linear layer"):
        plan(tmp_path / "other", folder)


def test_what_latent_attention_does_not_call_is_refused(tmp_path: Path) -> None:
    kv = {"layers.0.self_attn.kv_b_proj": SHAPES["kv_b_proj"]}
    with pytest.raises(InvalidRequest, match="'sql': it changes kv_b_proj"):
        plan(tmp_path, adapter(tmp_path, modules=kv), model_config={"kv_lora_rank": 8})


def test_weights_for_experts_do_not_move(tmp_path: Path) -> None:
    parallel = {"expert_parallel": True, "tensor_parallel_size": 2, "platform": "cuda"}
    with pytest.raises(InvalidRequest, match="would not move"):
        plan(tmp_path, adapter(tmp_path, modules=EXPERT), **parallel)


def test_experts_are_served_where_vllm_computes_them(tmp_path: Path) -> None:
    told = plan(tmp_path, adapter(tmp_path, modules=EXPERT), platform="cuda")
    assert "experts" in told.arguments["lora_target_modules"]


def safetensors(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


DEEP = "[" * 200_000
NO_TENSOR = "tells no dtype, shape and data_offsets of x"
NO_HEADERS = [
    pytest.param(safetensors("[]"), "header must be a JSON object", id="empty list"),
    pytest.param(safetensors("[1]"), "header must be a JSON object", id="list"),
    pytest.param(safetensors('"x"'), "header must be a JSON object", id="string"),
    pytest.param(safetensors("5"), "header must be a JSON object", id="number"),
    pytest.param(safetensors("null"), "header must be a JSON object", id="null"),
    pytest.param(safetensors(DEEP), "nested too deep", id="deep"),
    pytest.param(safetensors("{}")[:-1], "cut short", id="cut short"),
    pytest.param(b"", "cut short", id="nothing"),
    pytest.param(safetensors('{"x": 5}'), NO_TENSOR, id="tensor is a number"),
    pytest.param(safetensors('{"x": {"dtype": "F32", "data_offsets": [0, 0]}}'), NO_TENSOR, id="no shape"),
    *(
        pytest.param(
            safetensors(f'{{"x": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}'), why, id=name
        )
        for name, dtype, shape, offsets, why in [
            ("shape is null", '"F32"', "null", "[0, 0]", NO_TENSOR),
            ("shape is text", '"F32"', '"ab"', "[0, 0]", NO_TENSOR),
            ("shape of text", '"F32"', '["a", 2]', "[0, 0]", NO_TENSOR),
            ("shape below nothing", '"F32"', "[-1, 2]", "[0, 0]", NO_TENSOR),
            ("dtype is null", "null", "[1, 2]", "[0, 0]", NO_TENSOR),
            ("one offset", '"F32"', "[1, 2]", "[0]", NO_TENSOR),
            ("beyond the end", '"F32"', "[1, 2]", "[0, 8]", "x lies beyond its end"),
            ("backwards", '"F32"', "[1, 2]", "[0, -8]", "x lies beyond its end"),
        ]
    ),
]


@pytest.mark.parametrize(("content", "why"), NO_HEADERS)
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, why: str) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"adapters: 'sql': .*cannot be read: .*{why}") as refused:
        plan(tmp_path, folder)
    assert refused.value.field == "adapters"


@pytest.mark.parametrize(("content", "why"), NO_HEADERS)
def test_the_models_own_files_that_are_none(tmp_path: Path, content: bytes, why: str) -> None:
    own = model(tmp_path)
    (own / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"model_dir: .*cannot be read: .*{why}") as refused:
        plan_launch(VllmSettings.model_validate({}), own, "m", "both", {"sql": adapter(tmp_path)})
    assert refused.value.field == "model_dir"


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        pytest.param("adapter_config.json", None, r"no readable adapter_config\.json", id="no configuration"),
        pytest.param("adapter_config.json", b"{", r"no readable adapter_config\.json", id="broken configuration"),
        pytest.param("adapter_config.json", b"[]", "must be a JSON object", id="another configuration"),
        pytest.param("adapter_config.json", DEEP.encode(), "nested too deep", id="deep configuration"),
        pytest.param("adapter_config.json", b'{"r": 4, "rank_pattern": [1]}', "must map layers", id="ranks are a list"),
        pytest.param("adapter_config.json", b'{"r": 4, "rank_pattern": "x"}', "must map layers", id="ranks are text"),
        pytest.param("adapter_config.json", b'{"r": 4, "rank_pattern": 3}', "must map layers", id="ranks are a number"),
        pytest.param("adapter_model.safetensors", None, r"adapter_model\.safetensors cannot be read", id="no weights"),
        pytest.param("adapter_model.safetensors", b"PK\3\4" * 9, "cut short, or no safetensors", id="other weights"),
        pytest.param("adapter_model.safetensors", (2).to_bytes(8, "little") + b"{}", "no LoRA weights", id="empty"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, file: str, content: bytes | None, why: str) -> None:
    folder = adapter(tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"adapters: 'sql': .*{why}"):
        plan(tmp_path, folder)


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_without_an_adapter_get_nothing_added(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    import torch
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        for module in (lora_ops, punica_cpu):
            monkeypatch.setattr(module, name, getattr(lora_ops, name))
    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    rows = torch.randn(7, 24, generator=generator).to(kind)
    down = torch.randn(3, 1, 8, 24, generator=generator).to(kind)
    up = torch.randn(3, 1, 10, 8, generator=generator).to(kind)
    slots = torch.tensor([1, -1, 2, 2, -1, 0, 1])

    def changed() -> Any:
        """Of eight columns of twelve, as vLLM's CPU wrapper changes them."""
        lengths = torch.ones(7, dtype=torch.long)
        low, output = torch.zeros(7, 8), torch.ones(7, 16, dtype=kind)
        lora_ops.sgmv_shrink(rows, down, low, None, lengths, slots, 7, 1, 7, 2.0)
        lora_ops.sgmv_expand_slice(low, up, output, None, lengths, slots, 7, 1, 7, 3, 10, True)
        return output

    wanted = torch.ones(7, 16)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[row, 3:13] += up[slot, 0].float() @ (2 * down[slot, 0].float() @ rows[row].float())
    allowed = 1e-4 if dtype == "float32" else 2.0
    assert (changed() - wanted).abs().max() > 3, "vLLM leaves rows without an adapter alone: the fix can go"
    install("adapter_ops")
    install("adapter_ops")
    assert punica_cpu.bgmv_shrink is lora_ops.bgmv_shrink
    assert (changed() - wanted).abs().max() < allowed
    assert (changed()[slots < 0] == 1).all()
    replaced = torch.ones(7, 16, dtype=kind)
    lora_ops.bgmv_expand(torch.ones(7, 8), up, replaced, slots, add_inputs=False)
    assert torch.allclose(replaced[0, :10].float(), up[1, 0].float().sum(1), atol=0.2)
    assert (replaced[:, 10:] == 1).all()


@needs_vllm
def test_experts_keep_their_kernels_beside_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    made: list[object] = []
    monkeypatch.setattr(FusedMoEConfig, "__post_init__", made.append)
    install("adapters_beside_experts")
    install("adapters_beside_experts")
    config = object.__new__(FusedMoEConfig)
    config.is_lora_enabled = True
    config.__post_init__()
    assert made == [config], "vLLM's own is called, once"
    assert not config.is_lora_enabled
