"""What made a report: said on its last page."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("omni-placement", "numpy", "numba", "matplotlib")


def machine() -> Mapping[str, str]:
    """Processor, cores this process may use, system and the versions that decide a layout."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return {
        "Processor": f"{_processor()}, {cores} cores",
        "System": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "Versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, platform.machine())
