"""Engines started as a user starts them, and a proxy of one's own beside them for every policy."""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from sidebyside.child import Broken, terminate
from sidebyside.ports import free_port

from livereplay.figures import Samples

_OMNI = Path(sys.executable).parent / "omni"
_READY_S = 60.0
_STOP_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the engines. KV in GiB per engine."""

    model_dir: Path
    prefill: int
    decode: int
    block_tokens: int
    max_model_len: int
    prefill_kv_gib: float
    decode_kv_gib: float
    engine: str = "vllm"
    sim: Mapping[str, float] = field(default_factory=dict)
    """Times of simulated engines, by the names of their settings."""
    adapters: Sequence[str] = ()
    """Names, of simulated engines."""
    adapter_slots: int = 0

    @property
    def title(self) -> str:
        return f"{self.prefill}P{self.decode}D"

    @property
    def environment(self) -> Mapping[str, str]:
        if self.engine != "vllm":
            values = {f"TIMING__{name.upper()}": value for name, value in self.sim.items()}
            values |= {"ADAPTER_SLOTS": self.adapter_slots} if self.adapters else {}
            return {
                f"OMNI_{role}_SIM__{name}": str(value)
                for role in ("PREFILL", "DECODE")
                for name, value in values.items()
            }
        each = {"PREFILL": self.prefill_kv_gib, "DECODE": self.decode_kv_gib}
        return {
            f"OMNI_{role}_VLLM__{name}": str(value)
            for role, gib in each.items()
            for name, value in {"KV_CACHE_GIB": gib, "BLOCK_SIZE": self.block_tokens, "ENFORCE_EAGER": True}.items()
        }


@dataclass(frozen=True, slots=True)
class Engines:
    """`kvstore`: its address. `cores` are left by the engines; all where they leave none."""

    kvstore: str
    cores: frozenset[int]


@contextmanager
def engines(shape: Shape, home: Path) -> Iterator[Engines]:
    """`omni up`, detached; `omni down` at the end.

    Raises:
        Broken: it did not become healthy.
    """
    name, at = "replay", ("--home", str(home))
    command = [str(_OMNI), "up", "--detach", "--no-ask", "--name", name, "--port", str(free_port()), *at]
    command += ["--model", str(shape.model_dir), "--prefill", str(shape.prefill), "--decode", str(shape.decode)]
    command += ["--engine", shape.engine, "--max-model-len", str(shape.max_model_len)]
    command += [f"--adapter={adapter}={home}" for adapter in shape.adapters]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("OMNI_", "VLLM_"))}
    try:
        up = subprocess.run(command, env={**environ, **shape.environment}, capture_output=True, text=True, check=False)
        if up.returncode:
            raise Broken(f"omni up ended with code {up.returncode}\n{(up.stdout + up.stderr)[-3000:]}")
        records = json.loads((home / name / "state.json").read_text())["processes"]
        taken = {core for record in records for core in _cores(record.get("cores"))}
        kvstore = next(record["address"] for record in records if record["name"] == "kvstore")
        allowed = os.sched_getaffinity(0)
        yield Engines(kvstore, frozenset(allowed - taken or allowed))
    finally:
        subprocess.run([str(_OMNI), "down", "--name", name, *at], capture_output=True, check=False)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy process under one configuration."""

    port: int

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            body: bytes = answer.read()
        return body

    def samples(self) -> Samples:
        """Every sample of /metrics by name and labels."""
        families = text_string_to_metric_families(self.get("/metrics").decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    async def samples_meanwhile(self) -> Samples:
        return await asyncio.to_thread(self.samples)


@contextmanager
def proxy(shape: Shape, beside: Engines, config: Mapping[str, object], folder: Path) -> Iterator[Proxy]:
    """Ready when it has the engines' workers.

    Raises:
        Broken: it ended or was not ready in time.
    """
    port = free_port()
    path, log = folder / "scheduler.json", folder / "proxy.log"
    path.write_text(json.dumps(config))  # JSON is YAML
    values = {
        "PORT": port,
        "KVSTORE": beside.kvstore,
        "MODEL_DIR": shape.model_dir,
        "SCHEDULER_CONFIG": path,
        "LOG_LEVEL": "warning",
    }
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OMNI_")}
    environ |= {f"OMNI_PROXY_{name}": str(value) for name, value in values.items()}
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "omni_proxy"], env=environ, stdout=file, stderr=file)
    psutil.Process(process.pid).cpu_affinity(sorted(beside.cores))
    try:
        started = Proxy(port)
        deadline_s = time.monotonic() + _READY_S
        while not _is_ready(started, shape.prefill + shape.decode):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise Broken("the proxy did not become ready")
            time.sleep(_POLL_S)
        yield started
    except Broken as error:
        raise Broken(f"{error}\n{log.read_text(errors='replace')[-3000:]}") from None
    finally:
        terminate(process, _STOP_S)


def _is_ready(proxy: Proxy, workers: int) -> bool:
    try:
        seen = json.loads(proxy.get("/workers"))["workers"]
    except (OSError, ValueError):
        return False
    return len([worker for worker in seen if worker["takes_work"]]) == workers


def _cores(ranges: str | None) -> Sequence[int]:
    """`0-2,5`"""
    found: list[int] = []
    for part in (ranges or "").split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found
