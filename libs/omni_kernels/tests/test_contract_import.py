"""The real torch_npu, imported against generated stubs of CANN, registers what its schema files say."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_kernels.contract import schemas, stubs
from omni_kernels.contract.wheels import WHEELS, fetch

pytestmark = [pytest.mark.npu_import, pytest.mark.timeout(500)]
ROOM = 1 << 30
# Declared in the files, left to torch's own ops by the extension.
NOT_REGISTERED = {"dequantize", "int_repr", "_empty_affine_quantized"}

PROBE = """
import json
import torch, torch_npu
from omni_kernels.load import active, load

registered = {}
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("npu::"):
        registered.setdefault(schema.name.removeprefix("npu::"), []).append(str(schema))
load("npu")
try:
    torch.empty(1, device="npu")
    used = True
except RuntimeError:
    used = False
print(json.dumps({"available": torch.npu.is_available(), "used": used, "registered": registered, "active": active()}))
"""


def _why_not() -> str:
    if os.environ.get("OMNI_NPU_IMPORT") != "1":
        return "OMNI_NPU_IMPORT=1 runs it: 45 MB to fetch, 130 MB of room, gcc and readelf"
    missing = [tool for tool in stubs.TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return ""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    reason = _why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("torch_npu")
    if shutil.disk_usage(folder).free < ROOM:
        pytest.skip(f"less than 1 GiB free at {folder}")
    release = torch.__version__.partition("+")[0]
    wheel = next((wheel for wheel in WHEELS if wheel.version == release), None)
    if wheel is None or f"{sys.version_info.major}{sys.version_info.minor}" != wheel.python:
        pytest.skip(f"no wheel is pinned for torch {release} on this Python")
    fetch(wheel, folder)
    stubs.install(folder / wheel.file_name, folder / "site")
    specification = importlib.util.find_spec("torch")
    assert specification is not None and specification.origin is not None
    stubs.build(folder / "site", Path(specification.origin).parent / "lib", folder / "stubs")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "stubs"),
        "PYTHONPATH": str(folder / "site"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "release": release}


def test_the_extension_registers_the_schemas_of_its_files(
    imported: dict[str, Any], wheel_texts: dict[str, Path]
) -> None:
    registered = imported["registered"]
    declared = schemas.read(wheel_texts[imported["release"]])
    assert {name for name in declared if name not in registered} <= NOT_REGISTERED
    other = [
        str(overload)
        for name, overloads in declared.items()
        for overload in overloads
        if name in registered and str(overload) not in registered[name]
    ]
    assert other == []


def test_our_kernels_load_and_nothing_runs_without_a_device(imported: dict[str, Any]) -> None:
    assert not imported["available"] and not imported["used"]
    assert imported["active"]["rms_norm"] == "npu"
