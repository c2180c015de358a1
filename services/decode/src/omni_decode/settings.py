"""Settings of the decode service: OMNI_DECODE_*."""

from omni_engine.hosting.settings import EngineRole, WorkerSettings


class Settings(WorkerSettings):
    """A worker that takes the decode role unless told otherwise."""

    service = "decode"
    role: EngineRole = "decode"
