"""The digest by which engines know that they compute with the same weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omni_engine.weights import weights_digest

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


@pytest.fixture
def large() -> Tensors:
    """Of which only samples are read, but for the norms."""
    torch.manual_seed(0)
    matrices = {f"layers.{i}.mlp.weight": torch.rand(2048, 1024) for i in range(4)}
    return matrices | {f"layers.{i}.norm.weight": torch.ones(64) for i in range(4)}


def saved(folder: Path, *files: Tensors) -> str:
    folder.mkdir()
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{number}.safetensors")
    return weights_digest(folder)


def test_it_is_of_weights_and_configuration_wherever_they_lie(model: Path) -> None:
    digest = weights_digest(model)
    assert digest == weights_digest(MODEL_DIR)
    assert len(digest) == 16
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("moved")
    (model / "training_args.bin").write_text("of another run")
    (model / "optimizer.pt").symlink_to(model / "pruned")
    (model / "folder.safetensors").mkdir()
    assert weights_digest(model) == digest
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 1.5}))
    assert weights_digest(model) != digest


def test_one_bit_of_a_small_model_changes_it(model: Path) -> None:
    digest = weights_digest(model)
    weights = next(model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert weights_digest(model) != digest


@pytest.mark.parametrize("name", ["layers.0.norm.weight", "layers.3.norm.weight", "layers.2.mlp.weight"])
def test_one_tensor_of_a_large_model_changes_it(tmp_path: Path, large: Tensors, name: str) -> None:
    changed = large | {name: large[name] + 0.01 * torch.rand_like(large[name])}
    assert saved(tmp_path / "changed", changed) != saved(tmp_path / "one", large)


def test_it_is_the_same_however_they_are_cut_into_files(tmp_path: Path, large: Tensors) -> None:
    names = sorted(large)
    parts = [{name: large[name] for name in half} for half in (names[::2], names[1::2])]
    assert saved(tmp_path / "two", *parts) == saved(tmp_path / "one", large)
    swapped = large | {names[0]: large[names[2]], names[2]: large[names[0]]}
    assert saved(tmp_path / "swapped", swapped) != weights_digest(tmp_path / "one")


def test_other_formats_count_where_there_are_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1 << 20))
    digest = weights_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(bytes((1 << 20) - 1) + b"1")
    assert weights_digest(tmp_path) != digest


def test_a_file_that_is_none_is_named(model: Path) -> None:
    (model / "rest.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"rest\.safetensors: it is cut short"):
        weights_digest(model)
