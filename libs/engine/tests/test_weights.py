"""The digest by which engines know that they compute with the same weights."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from omni_engine.weights import weights_digest

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
LARGE_BYTES = 64 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def test_it_is_of_weights_and_configuration_wherever_they_lie(model: Path) -> None:
    digest = weights_digest(model)
    assert digest == weights_digest(MODEL_DIR)
    assert len(digest) == 16
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("moved")
    assert weights_digest(model) == digest
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 1.5}))
    assert weights_digest(model) != digest


def test_one_number_of_a_small_model_changes_it(model: Path) -> None:
    digest = weights_digest(model)
    weights = next(model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert weights_digest(model) != digest


def test_one_tensor_of_a_large_model_changes_it(tmp_path: Path) -> None:
    """A hundredth of a file, wherever it lies; read are samples."""
    weights = tmp_path / "model.safetensors"
    digests = set()
    for place in (None, 0.0, 0.37, 0.5, 0.99):
        with weights.open("wb") as file:
            file.truncate(LARGE_BYTES)
            if place is not None:
                file.seek(int(place * LARGE_BYTES))
                file.write(struct.pack("<H", 16256) * (LARGE_BYTES // 200))
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 5


def test_weights_in_another_order_are_other_weights(tmp_path: Path) -> None:
    for order, folder in (("ab", "one"), ("ba", "two")):
        (tmp_path / folder).mkdir()
        for name, content in zip(("1.safetensors", "2.safetensors"), order, strict=True):
            (tmp_path / folder / name).write_text(content)
    assert weights_digest(tmp_path / "one") != weights_digest(tmp_path / "two")
