"""vLLM's `general_plugins` hook: what must happen inside the engine's own processes.

Engine processes end with the process that started them: vLLM's engine core and workers notice an orderly end only,
so a service that crashes would leave them behind with the model's memory and their cores.

The KV connector's progress thread sleeps between polls: NIXL's Python agent fixes the pause at 0, and a spinning
thread takes the core from the engine it serves.

With expert parallelism, what `vllm_expert_shims` changes is changed here, before the worker makes its model; so are the
corrections of `vllm_cpu_fixes` that an engine needs.
"""

import importlib
import multiprocessing
import os
import threading
from typing import Any

from omni_engine.vllm_cpu_fixes import FIXES_VARIABLE, install

PROGRESS_VARIABLE = "OMNI_ENGINE_KV_PROGRESS_US"
EXPERTS_VARIABLE = "OMNI_ENGINE_EXPERTS"
_THREAD = "omni-parent-watch"


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    _end_with(parent)
    if (interval := os.environ.get(PROGRESS_VARIABLE, "0")) != "0":
        _pause_progress(int(interval))
    if os.environ.get(EXPERTS_VARIABLE):
        importlib.import_module("omni_engine.vllm_expert_shims").install()
    if fixes := os.environ.get(FIXES_VARIABLE):
        install(fixes)


def _end_with(parent: Any) -> None:
    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name=_THREAD, daemon=True).start()


def _pause_progress(interval_us: int) -> None:
    """Make NIXL agents created from now on poll every `interval_us` at least; no-op without nixl."""
    try:
        bindings = importlib.import_module("nixl._api").nixlBind
    except ImportError:
        return

    class PausedConfig(bindings.nixlAgentConfig):  # type: ignore[misc, name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, max(value, interval_us) if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = PausedConfig
