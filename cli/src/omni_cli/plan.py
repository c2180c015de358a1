"""Options and machine in, processes out. Pure: nothing is started, opened or read here.

StackOptions + Machine + free ports -> StackPlan
                                         └── ProcessSpec per process: module, environment, port, probe
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path

from omni_cli.errors import InvalidOptions, NotEnoughMemory

GIB = 1024**3
ENGINE_PROCESS_BYTES = {"vllm": 3 * GIB, "sim": GIB // 4}
DRAFTERS = ("mtp", "ngram", "auto")
DEFAULT_KV_CACHE_GIB = {"vllm": 1.0, "sim": 0.0}
OTHER_SERVICES_BYTES = GIB
MAX_CORES_PER_ENGINE = 16


class Probe(StrEnum):
    """How a process is asked whether it is ready."""

    GRPC_HEALTH = "grpc"
    HTTP_READY = "http"
    HTTPS_READY = "https"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan may use: logical cores this process may run on, and memory that is free."""

    cores: tuple[int, ...]
    available_bytes: int


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What was asked for; see `omni up --help`."""

    name: str
    directory: Path
    model_dir: Path
    prefill: int = 1
    decode: int = 1
    both: int = 0
    engine: str = "vllm"
    host: str = "127.0.0.1"
    port: int = 8000
    redis_url: str | None = None
    otlp_endpoint: str | None = None
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    expert_ranks: int = 0
    spare_experts: int = 0
    kernels: str = "vllm"
    speculative: str | None = None
    attention_pattern: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    https: bool = False

    @property
    def engines(self) -> int:
        return self.prefill + self.decode + self.both

    @property
    def ranks(self) -> int:
        """Worker processes of each engine."""
        return max(1, self.expert_ranks)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: `python -m omni_<service>` with `environment` on top of the caller's."""

    name: str
    service: str
    environment: Mapping[str, str]
    host: str
    port: int
    probe: Probe = Probe.GRPC_HEALTH
    metrics_port: int | None = None
    cores: str | None = None

    @property
    def module(self) -> str:
        return f"omni_{self.service}"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Every process in starting order, and what the reader should know about the choices made."""

    name: str
    specs: tuple[ProcessSpec, ...]
    workers: int
    notes: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"{self.specs[-1].probe}://{self.specs[-1].address}"


def plan_stack(options: StackOptions, machine: Machine, ports: Iterator[int]) -> StackPlan:
    """Choose ports, cores and settings of every process.

    Raises:
        InvalidOptions: counts or engine out of range.
        NotEnoughMemory: the engines would not fit; the message gives both figures.
    """
    _check(options)
    notes = _memory_notes(options, machine)
    if options.engine == "sim":
        notes.append("simulated engines: answers are made up, and times are those of a model")
    needed = options.engines * options.ranks
    ranges = split_cores(machine.cores, needed, in_step=options.ranks > 1)
    if options.engine == "vllm" and len(machine.cores) < needed:
        what = f"{options.engines} engines" if options.ranks == 1 else f"{needed} ranks of {options.engines} engines"
        notes.append(f"{what} share {len(machine.cores)} core(s): each token takes longer")
    kvstore, placement = _kvstore(options, ports), _placement(options, ports)
    roles = ["prefill"] * options.prefill + ["decode"] * options.decode + ["both"] * options.both
    indexes = [*range(options.prefill), *range(options.decode), *range(options.both)]
    by_engine = ["|".join(ranges[i : i + options.ranks]) for i in range(0, needed, options.ranks)]
    stores = {"KVSTORE": kvstore.address} | ({"PLACEMENT": placement.address} if options.expert_ranks else {})
    engines = [
        _engine(options, role, index, stores, cores, ports)
        for role, index, cores in zip(roles, indexes, by_engine, strict=True)
    ]
    specs = (kvstore, placement, *engines, _proxy(options, kvstore.address))
    return StackPlan(options.name, specs, options.engines, tuple(notes))


def split_cores(cores: Sequence[int], engines: int, in_step: bool = False) -> list[str]:
    """One range for each engine, or rank, disjoint while there are cores enough, else shared in turn.

    One core is left to the other services where every engine has at least two without it. Ranks work `in_step`: each
    waits for the slowest at every layer, so what a service takes from one it takes from all, and one apiece is enough.
    """
    if not cores:
        raise InvalidOptions("this process may not run on any core")
    usable = list(cores)
    if len(usable) > (1 if in_step else 2) * engines:
        usable = usable[1:]
    if len(usable) < engines:
        return [str(usable[i % len(usable)]) for i in range(engines)]
    share = min(len(usable) // engines, MAX_CORES_PER_ENGINE)
    return [_as_ranges(usable[i * share : (i + 1) * share]) for i in range(engines)]


def _as_ranges(cores: Sequence[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    parts = []
    for _, group in groupby(enumerate(cores), lambda pair: pair[1] - pair[0]):
        run = [core for _, core in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def _check(options: StackOptions) -> None:
    if options.engine not in ENGINE_PROCESS_BYTES:
        raise InvalidOptions(f"--engine {options.engine!r}: choose one of {', '.join(ENGINE_PROCESS_BYTES)}")
    if min(options.prefill, options.decode, options.both) < 0 or options.decode + options.both < 1:
        raise InvalidOptions("at least one decode worker is needed (--decode 1 or --both 1); --prefill may be 0")
    if options.expert_ranks < 0 or options.expert_ranks == 1:
        raise InvalidOptions("--expert-ranks spreads the experts over 2 ranks or more; leave it out for none")
    if options.kernels.partition(":")[0] not in ("vllm", "omni"):
        raise InvalidOptions(f"--kernels {options.kernels!r}: vllm, omni, or parts as in omni:norms,routing")
    if options.kernels != "vllm" and options.engine != "vllm":
        raise InvalidOptions(f"--kernels {options.kernels!r}: a simulated engine runs no kernels")
    if options.speculative is not None:
        _check_speculative(options)
    if options.kv_cache_gib is not None and options.engine != "vllm":
        raise InvalidOptions(
            "--kv-cache-gib: a simulated engine counts blocks instead (OMNI_DECODE_SIM__NUM_BLOCKS=4096)"
        )
    if options.attention_pattern is not None and options.engine != "vllm":
        raise InvalidOptions("--attention-pattern: a simulated engine computes no attention")
    if options.spare_experts and not options.expert_ranks:
        raise InvalidOptions("--spare-experts are slots on the ranks of --expert-ranks, which is missing")
    if not 1 <= options.port <= 65535:
        raise InvalidOptions(f"--port {options.port} is not between 1 and 65535")


def _check_speculative(options: StackOptions) -> None:
    method, colon, tokens = (options.speculative or "").partition(":")
    if method not in DRAFTERS or (colon and not (tokens.isdigit() and 1 <= int(tokens) <= 16)):
        raise InvalidOptions(
            f"--speculative {options.speculative!r}: a drafter ({', '.join(DRAFTERS)}) and 1 to 16 tokens, as in mtp:2"
        )
    if options.engine != "vllm":
        raise InvalidOptions("--speculative: a simulated engine drafts nothing")
    if options.expert_ranks:
        raise InvalidOptions("--speculative and --expert-ranks: layouts do not reach a drafter's experts; choose one")


def _memory_notes(options: StackOptions, machine: Machine) -> list[str]:
    kv_gib = DEFAULT_KV_CACHE_GIB[options.engine] if options.kv_cache_gib is None else options.kv_cache_gib
    ranks = options.ranks if options.engine == "vllm" else 1
    each = ranks * (ENGINE_PROCESS_BYTES[options.engine] + int(kv_gib * GIB))
    needed = options.engines * each + OTHER_SERVICES_BYTES
    figures = (
        f"{options.engines} engine(s) of about {each / GIB:.1f} GiB and the other services need "
        f"{needed / GIB:.1f} GiB; {machine.available_bytes / GIB:.1f} GiB are free"
    )
    if needed > machine.available_bytes:
        raise NotEnoughMemory(f"{figures}. Use fewer engines, a smaller --kv-cache-gib, or --engine sim")
    return [figures] if needed > 0.8 * machine.available_bytes else []


def _shared(options: StackOptions, service: str, metrics_port: int | None) -> dict[str, str]:
    prefix = f"OMNI_{service.upper()}_"
    values = {"HOST": options.host if service == "proxy" else "127.0.0.1", "LOG_FORMAT": "json"}
    if metrics_port is not None:
        values["METRICS_PORT"] = str(metrics_port)
    if options.otlp_endpoint:
        values["OTLP_ENDPOINT"] = options.otlp_endpoint
    return {prefix + name: value for name, value in values.items()}


def _kvstore(options: StackOptions, ports: Iterator[int]) -> ProcessSpec:
    port, metrics = next(ports), next(ports)
    environment = _shared(options, "kvstore", metrics) | {"OMNI_KVSTORE_PORT": str(port)}
    if options.redis_url:
        environment |= {"OMNI_KVSTORE_REDIS_URL": options.redis_url, "OMNI_KVSTORE_CLUSTER": options.name}
    else:
        environment["OMNI_KVSTORE_EMBEDDED_REDIS_DIR"] = str(options.directory / "redis")
    return ProcessSpec("kvstore", "kvstore", environment, "127.0.0.1", port, metrics_port=metrics)


def _placement(options: StackOptions, ports: Iterator[int]) -> ProcessSpec:
    port, metrics = next(ports), next(ports)
    environment = _shared(options, "placement", metrics) | {
        "OMNI_PLACEMENT_PORT": str(port),
        "OMNI_PLACEMENT_STATE_DIR": str(options.directory / "placement"),
    }
    return ProcessSpec("placement", "placement", environment, "127.0.0.1", port, metrics_port=metrics)


def _engine(
    options: StackOptions, role: str, index: int, stores: Mapping[str, str], cores: str, ports: Iterator[int]
) -> ProcessSpec:
    """A worker of both legs is a decode service with that role. `stores` are the services it finds, by setting."""
    port, metrics = next(ports), next(ports)
    service = "decode" if role == "both" else role
    values = {
        "WORKER_ID": f"{options.name}-{role}-{index}",
        "PORT": str(port),
        **stores,
        "MODEL_DIR": str(options.model_dir),
        "ENGINE": options.engine,
    }
    if role == "both":
        values["ROLE"] = role
    if options.engine == "vllm":
        values |= {"VLLM__CORES": cores, "VLLM__KV_PORT": str(next(ports))}
        if options.kv_cache_gib is not None:
            values["VLLM__KV_CACHE_GIB"] = str(options.kv_cache_gib)
        if options.kernels != "vllm":
            values["VLLM__KERNELS"] = options.kernels
        if options.speculative is not None:
            values["VLLM__SPECULATIVE"] = options.speculative
        if options.attention_pattern is not None:
            values["VLLM__ATTENTION_PATTERN"] = str(options.attention_pattern)
    if options.adapters:
        values["ADAPTERS"] = json.dumps({name: str(path) for name, path in options.adapters.items()})
    if options.max_model_len is not None:
        values[f"{options.engine.upper()}__MAX_MODEL_LEN"] = str(options.max_model_len)
    values |= _expert_parallel(options)
    environment = _shared(options, service, metrics) | {f"OMNI_{service.upper()}_{k}": v for k, v in values.items()}
    pinned = cores if options.engine == "vllm" else None
    return ProcessSpec(f"{role}-{index}", service, environment, "127.0.0.1", port, metrics_port=metrics, cores=pinned)


def _expert_parallel(options: StackOptions) -> dict[str, str]:
    ranks, spare = str(options.expert_ranks), str(options.spare_experts)
    if not options.expert_ranks:
        return {}
    if options.engine == "sim":
        return {"SIM__EXPERTS__NUM_RANKS": ranks, "SIM__EXPERTS__SPARE_SLOTS": spare}
    return {
        "VLLM__EXPERT_PARALLEL": "true",
        "VLLM__TENSOR_PARALLEL_SIZE": ranks,
        "VLLM__REDUNDANT_EXPERTS": spare,
    }


def _proxy(options: StackOptions, kvstore: str) -> ProcessSpec:
    environment = _shared(options, "proxy", None) | {
        "OMNI_PROXY_PORT": str(options.port),
        "OMNI_PROXY_KVSTORE": kvstore,
        "OMNI_PROXY_MODEL_DIR": str(options.model_dir),
    }
    probe = Probe.HTTPS_READY if options.https else Probe.HTTP_READY
    return ProcessSpec("proxy", "proxy", environment, options.host, options.port, probe=probe)
