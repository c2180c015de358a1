"""Settings of the prefill service: OMNI_PREFILL_*."""

from omni_engine.hosting.settings import EngineRole, WorkerSettings


class Settings(WorkerSettings):
    """A worker that takes the prefill role unless told otherwise."""

    service = "prefill"
    role: EngineRole = "prefill"
