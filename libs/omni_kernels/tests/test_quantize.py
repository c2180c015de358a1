"""Checkpoints written by `omni quantize`: what is in them, how far they are off, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

from omni_kernels.ops.quant import quantized
from omni_kernels.quantize import verification
from omni_kernels.quantize.checkpoint import read_config, weights_of, write
from omni_kernels.quantize.choice import Choice, Weight, choose, is_quantizable
from omni_kernels.quantize.verification import verify

TINY_MOE = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
DENSE = {"hidden_size": 64, "intermediate_size": 96}
LATENT = {"hidden_size": 64, "n_routed_experts": 2, "moe_intermediate_size": 32, "kv_lora_rank": 512}


def quantized_copy(model: Path, out: Path) -> Choice:
    choice = choose(weights_of(model), read_config(model), "w8a8")
    write(model, out, choice)
    return choice


def folder(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def latent(generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    sizes = {
        "model.embed_tokens.weight": (50, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 64),
        "model.layers.0.self_attn.kv_b_proj.weight": (128, 512),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.gate.weight": (2, 64),
        "model.layers.0.mlp.gate.e_score_correction_bias": (2,),
        "model.layers.0.mlp.shared_experts.down_proj.weight": (64, 32),
        "model.layers.0.mlp.experts.0.gate_proj.weight": (32, 64),
        "model.layers.0.mlp.experts.1.gate_proj.weight": (32, 64),
        "model.layers.1.eh_proj.weight": (64, 128),
        "model.layers.1.self_attn.o_proj.weight": (64, 64),
        "model.layers.1.shared_head.head.weight": (50, 64),
        "lm_head.weight": (50, 64),
    }
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=4, max_size=4), min_size=1, max_size=6
    )
)
def test_every_value_is_within_half_a_step(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    codes, scale = quantized(weight)
    step = weight.abs().amax(1) / 127
    assert codes.dtype == torch.int8
    assert torch.allclose(scale, step)
    assert ((codes * scale.unsqueeze(1) - weight).abs() <= step.unsqueeze(1) * 0.5001).all()


def test_the_trained_model_is_written_and_checked(tmp_path: Path) -> None:
    choice = quantized_copy(TINY_MOE, tmp_path / "out")
    rows = verify(TINY_MOE, tmp_path / "out", choice, "w8a8")
    assert all(0.003 < row.mean_error <= row.worst_error < 0.01 for row in rows[:-1])
    assert sum(row.matrices for row in rows[:-1]) == 4 * (4 + 16 * 3)
    after, before = (sum(getattr(row, f"bytes_{when}") for row in rows) for when in ("after", "before"))
    assert after < 0.6 * before
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "config.json"}
    tensors, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(TINY_MOE / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    assert tensors[name].dtype == torch.int8
    assert tensors[name.replace("weight", "weight_scale")].shape == (64, 1)
    assert torch.equal(tensors["model.layers.0.mlp.gate.weight"], original["model.layers.0.mlp.gate.weight"])


def test_the_library_engines_read_by_takes_the_result(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", latent(torch.Generator().manual_seed(0)), LATENT)
    quantized_copy(model, tmp_path / "out")
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme.weights, QuantizationArgs)
    assert scheme.input_activations is not None
    assert scheme.input_activations.dynamic
    tensors, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.0.self_attn.o_proj"
    stored = {part: tensors[f"{name}.{part}"] for part in ("weight", "weight_scale")}
    read = IntQuantizationCompressor.decompress(stored, scheme)["weight"]
    original = load_file(model / "model.safetensors")[f"{name}.weight"]
    assert float((read.float() - original.float()).norm() / original.float().norm()) < 0.02


def test_what_is_sensitive_stays(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", latent(), LATENT)
    choice = quantized_copy(model, tmp_path / "out")
    assert {name.rsplit(".", 2)[1] for name in choice.quantized} == {
        "kv_a_proj_with_mqa", "o_proj", "gate_proj", "down_proj",
    }  # fmt: skip
    assert {
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.1.eh_proj",
    } <= set(choice.kept_modules)
    assert "model.layers.1.head" in choice.kept_modules, "as vLLM names the prediction layer's head"
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert sorted(ignored) == list(choice.kept_modules)


@pytest.mark.parametrize(
    ("config", "scheme", "names"),
    [
        ({"quantization_config": {}, **DENSE}, "w8a8", None),
        ({"quantization_config": {"quant_method": "fp8"}, **DENSE}, "w8a8", "quantization_config"),
        (DENSE, "w4a8", "--scheme.*dense"),
        (LATENT, "w4a8", "--scheme.*experts"),
        (DENSE, "int3", "--scheme.*int3"),
        ({**LATENT, "moe_intermediate_size": 40}, "w8a8", "moe_intermediate_size: 40"),
        ({**LATENT, "hidden_size": 72}, "w8a8", "hidden_size: 72"),
    ],
)
def test_what_could_not_be_served_is_refused(config: dict[str, Any], scheme: str, names: str | None) -> None:
    weights = [Weight("model.layers.0.self_attn.o_proj.weight", (64, 64), "BF16")]
    if names is None:
        assert choose(weights, config, scheme).quantized
        return
    with pytest.raises(ValueError, match=names):
        choose(weights, config, scheme)


@pytest.mark.parametrize(
    ("weight", "names"),
    [
        (Weight("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 64), "BF16"), "gate_up_proj.*one matrix"),
        (Weight("model.layers.0.self_attn.q_proj.weight", (64, 64), "F8_E4M3"), "q_proj.*F8_E4M3"),
        (Weight("transformer.h.0.attn.weight", (64, 64), "BF16"), "no tensor"),
    ],
)
def test_tensors_that_are_not_known_are_refused_by_name(weight: Weight, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        choose([weight], DENSE, "w8a8")


def test_folders_are_refused_by_name(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", latent(), LATENT)
    with pytest.raises(ValueError, match=r"safetensors"):
        weights_of(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        quantized_copy(model, model)
    broken = latent()
    broken["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"o_proj\.weight.*finite"):
        quantized_copy(folder(tmp_path / "broken", broken, LATENT), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("fault", ["code", "scale", "kept", "missing"])
def test_checking_finds_what_is_wrong(tmp_path: Path, fault: str) -> None:
    model, out = folder(tmp_path / "model", latent(), LATENT), tmp_path / "out"
    choice = quantized_copy(model, out)
    tensors, name = load_file(out / "model.safetensors"), "model.layers.0.self_attn.o_proj.weight"
    match fault:
        case "code":
            tensors[name][3] = 0
        case "scale":
            tensors[f"{name}_scale"] *= 1.1
        case "kept":
            tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors")
    if fault == "missing":
        (out / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match={"kept": "lm_head", "missing": "missing"}.get(fault, "o_proj.*relative error")
    ):
        verify(model, out, choice, "w8a8")


def sharded(model: Path) -> tuple[list[str], dict[str, str]]:
    """The latent model in two files; their names, and the index."""
    model.mkdir()
    tensors = latent()
    halves = [dict(list(tensors.items())[:7]), dict(list(tensors.items())[7:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, model / name)
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (model / "config.json").write_text(json.dumps(LATENT))
    return names, index


def test_shards_and_their_index_stay(tmp_path: Path) -> None:
    model = tmp_path / "model"
    _, index = sharded(model)
    choice = quantized_copy(model, tmp_path / "out")
    verify(model, tmp_path / "out", choice, "w8a8")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert written.items() >= index.items()
    scales = {f"{name}_scale" for name in choice.quantized}
    assert scales == written.keys() - index.keys()
    for name, file in written.items():
        assert name in load_file(tmp_path / "out" / file)


def test_a_model_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (_, lost), index = sharded(model)
    (model / lost).unlink()
    named = min(name for name, file in index.items() if file == lost)
    with pytest.raises(ValueError, match=rf"tensors are missing, such as {re.escape(named)} \({lost}\)"):
        quantized_copy(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("model.layers.3.mlp.gate_proj.weight", True),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", True),
        ("model.layers.3.mlp.experts.15.down_proj.weight", True),
        ("model.layers.3.self_attn.q_b_proj.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.self_attn.kv_b_proj.weight", False),
        ("model.layers.3.self_attn.q_norm.weight", False),
        ("model.layers.3.shared_head.head.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_names(name: str, taken: bool) -> None:
    assert is_quantizable(Weight(name, (64, 64), "BF16")) is taken


def test_the_command_refuses_in_words(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from omni_kernels.quantize.commands import app

    ran = testing.CliRunner().invoke(app, [str(tmp_path), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "safetensors" in ran.output


@pytest.mark.parametrize(
    ("weights", "config", "out", "named"),
    [
        pytest.param(b"no safetensors", "{}", "out", "model.safetensors: not a safetensors file", id="weights"),
        pytest.param(None, "[1]", "out", "config.json: must be a JSON object", id="config"),
        pytest.param(None, None, "file", "--out:", id="a file for a folder"),
        pytest.param(None, None, "file/out", "file/out", id="below a file"),
    ],
)
def test_the_command_refuses_what_it_cannot_read_or_write(
    tmp_path: Path, weights: bytes | None, config: str | None, out: str, named: str
) -> None:
    testing = pytest.importorskip("typer.testing")
    from omni_kernels.quantize.commands import app

    model = folder(tmp_path / "model", latent(), LATENT)
    (tmp_path / "file").touch()
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)
    if config is not None:
        (model / "config.json").write_text(config)
    given = [str(model), "--out", str(tmp_path / out)]
    ran = testing.CliRunner().invoke(app, given, env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert ran.exit_code == 2, ran.output
    assert named in ran.output


def test_a_copy_that_is_wrong_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from omni_kernels.quantize.commands import app

    monkeypatch.setattr(verification, "LIMIT", 1e-6)
    model = folder(tmp_path / "model", latent(), LATENT)
    ran = testing.CliRunner().invoke(app, [str(model), "--out", str(tmp_path / "out")], env={"COLUMNS": "400"})
    assert ran.exit_code == 2 and "relative error" in ran.output
    assert not list((tmp_path / "out").iterdir())


def test_the_command_prints_what_it_checked(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from omni_kernels.quantize.commands import app

    model = folder(tmp_path / "model", latent(torch.Generator().manual_seed(0)), LATENT)
    ran = testing.CliRunner().invoke(app, [str(model), "--out", str(tmp_path / "out"), "--json"])
    assert ran.exit_code == 0
    layers = {row["layer"]: row for row in json.loads(ran.output)["layers"]}
    assert layers["model.layers.0.mlp.experts.*.gate_proj"]["matrices"] == 2
    assert 0.003 < layers["model.layers.0.self_attn.o_proj"]["mean_error"] < 0.02
