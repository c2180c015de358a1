"""The engines a worker can host, by the name in its settings."""

from collections.abc import Callable, Mapping

from omni_common.errors import InvalidRequest
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.ports import Engine


def _vllm(settings: WorkerSettings) -> Engine:
    if settings.model_dir is None:
        raise InvalidRequest("the vllm engine needs a model_dir", field="model_dir")
    # Imported here: a worker with a simulated engine runs where vLLM's dependencies are not installed.
    from omni_engine.vllm import VllmEngine

    # Events that nobody reads would gather in memory.
    vllm = settings.vllm if settings.kvstore else settings.vllm.model_copy(update={"kv_events": False})
    return VllmEngine(vllm, settings.model_dir, settings.model_name, settings.role, settings.adapters)


def _sim(settings: WorkerSettings) -> Engine:
    from omni_engine.sim import SimEngine

    return SimEngine(settings.sim.for_model(settings.model_dir), settings.model_name, adapters=settings.adapters)


ENGINES: Mapping[str, Callable[[WorkerSettings], Engine]] = {"vllm": _vllm, "sim": _sim}
