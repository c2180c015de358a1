"""The systems under test, as commands and environments. Nothing is started here.

A system is what a client talks to; a part is a set of processes that starts and freezes together.
Two systems may share a part: the same vLLM server is measured alone (b) and behind a router (b2).
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HOST = "127.0.0.1"
MODEL = "bench"
ENGINE_CORE = 0
OTHER_CORE = 1
# Where vLLM's engine core process runs: with its worker, with everything else, or wherever the kernel puts it.
Placement = Literal["together", "apart", "free"]


class NotAvailable(Exception):
    """A system cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What every engine is told alike."""

    model_dir: Path
    max_model_len: int = 4096
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_gib: float = 0.5
    is_eager: bool = True


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start. `worker_core` is where its engine's worker computes."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    worker_core: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Processes that live and freeze together. `ready_path` answers 200 when they can serve."""

    name: str
    commands: tuple[Command, ...]
    port: int
    ready_path: str
    workers: int = 0

    @property
    def engines(self) -> int:
        return sum(c.worker_core is not None for c in self.commands)


@dataclass(frozen=True, slots=True)
class System:
    """What one column of the table shows. The client talks to the last part."""

    key: str
    title: str
    parts: tuple[Part, ...]

    @property
    def port(self) -> int:
        return self.parts[-1].port


@dataclass(frozen=True, slots=True)
class Site:
    """Where systems are planned: engine settings, scratch directory, free ports, the router's program."""

    engine: EngineSettings
    directory: Path
    ports: Iterator[int]
    router: Path


def vllm_server(site: Site, core: int) -> Part:
    """vLLM's own OpenAI server, its access log off."""
    engine, port = site.engine, next(site.ports)
    options = {
        "--model": engine.model_dir,
        "--served-model-name": MODEL,
        "--host": HOST,
        "--port": port,
        "--max-model-len": engine.max_model_len,
        "--max-num-seqs": engine.max_num_seqs,
        "--max-num-batched-tokens": engine.max_num_batched_tokens,
        "--kv-cache-memory-bytes": int(engine.kv_cache_gib * 1024**3),
    }
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log"]
    arguments += [str(word) for option in options.items() for word in option]
    if engine.is_eager:
        arguments.append("--enforce-eager")
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    name = f"vllm-{core}"
    return Part(name, (Command("api server", tuple(arguments), environment, core),), port, "/health")


def router(site: Site, name: str, servers: tuple[Part, ...]) -> Part:
    """vllm-router in front of servers.

    Raises:
        NotAvailable: the program is not installed.
    """
    if not site.router.exists():
        raise NotAvailable(
            f"{site.router} is missing: python3 -m venv .venv-bench && .venv-bench/bin/pip install vllm-router"
        )
    port = next(site.ports)
    urls = [f"http://{HOST}:{server.port}" for server in servers]
    arguments = [str(site.router), "--host", HOST, "--port", str(port), "--policy", "round_robin"]
    arguments += ["--log-level", "warning", "--prometheus-port", str(next(site.ports)), "--worker-urls", *urls]
    return Part(name, (Command("vllm-router", tuple(arguments)),), port, "/health")


def omni(site: Site, name: str, roles: Mapping[str, int]) -> Part:
    """kvstore with its own Redis, one worker per role on the core given, and the proxy."""
    kvstore, proxy = next(site.ports), next(site.ports)
    address = f"{HOST}:{kvstore}"
    connector = "NixlConnector" if len(roles) > 1 else ""
    commands = [
        _service("kvstore", {"PORT": kvstore, "EMBEDDED_REDIS_DIR": site.directory / name / "redis"}),
        *(_worker(site, name, role, core, address, connector) for role, core in roles.items()),
        _service(
            "proxy",
            {"PORT": proxy, "KVSTORE": address, "MODEL_DIR": site.engine.model_dir, "SERVED_MODEL_NAME": MODEL},
        ),
    ]
    return Part(name, tuple(commands), proxy, "/ready", workers=len(roles))


def _worker(site: Site, name: str, role: str, core: int, kvstore: str, connector: str) -> Command:
    engine = site.engine
    values = {
        "WORKER_ID": f"{name}-{role}",
        "PORT": next(site.ports),
        "KVSTORE": kvstore,
        "ROLE": role,
        "MODEL_DIR": engine.model_dir,
        "SERVED_MODEL_NAME": MODEL,
        "ENGINE": "vllm",
        "VLLM__CORES": core,
        "VLLM__KV_CACHE_GIB": engine.kv_cache_gib,
        "VLLM__MAX_MODEL_LEN": engine.max_model_len,
        "VLLM__MAX_NUM_SEQS": engine.max_num_seqs,
        "VLLM__MAX_NUM_BATCHED_TOKENS": engine.max_num_batched_tokens,
        "VLLM__ENFORCE_EAGER": engine.is_eager,
        "VLLM__KV_CONNECTOR": connector,
    }
    return _service(role, values, core)


def _service(service: str, values: Mapping[str, object], core: int | None = None) -> Command:
    prefix = f"OMNI_{service.upper()}_"
    environment = {prefix + name: str(value) for name, value in values.items()} | {prefix + "LOG_LEVEL": "warning"}
    return Command(service, (sys.executable, "-m", f"omni_{service}"), environment, core)


def _omni_alone(site: Site, server: Part) -> System:
    return System("a", "Omni, 1 engine", (omni(site, "omni-a", {"decode": ENGINE_CORE}),))


def _vllm_alone(site: Site, server: Part) -> System:
    return System("b", "vLLM server, 1 engine", (server,))


def _routed(site: Site, server: Part) -> System:
    return System("b2", "vllm-router + vLLM server, 1 engine", (server, router(site, "router-b2", (server,))))


def _omni_split(site: Site, server: Part) -> System:
    roles = {"prefill": OTHER_CORE, "decode": ENGINE_CORE}
    return System("c", "Omni 1P1D, 2 engines", (omni(site, "omni-c", roles),))


def _routed_pair(site: Site, server: Part) -> System:
    servers = (server, vllm_server(site, OTHER_CORE))
    return System("d", "vllm-router + 2 vLLM servers, 2 engines", (*servers, router(site, "router-d", servers)))


SYSTEMS: Mapping[str, Callable[[Site, Part], System]] = {
    "a": _omni_alone,
    "b": _vllm_alone,
    "b2": _routed,
    "c": _omni_split,
    "d": _routed_pair,
}
