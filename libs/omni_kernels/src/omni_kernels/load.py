"""Choose a backend by name. Nothing is chosen silently: a backend that cannot be had is an error with its fix."""

import importlib

# What each backend needs; cpu is the ops' meaning itself.
BACKENDS = {
    "cpu": None,
    "npu": "install torch_npu for this torch, and the CANN toolkit it names",
}


def load(backend: str) -> None:
    """Register the kernels of `backend` with torch's dispatcher.

    Raises:
        ValueError: no backend of that name; the message lists the known ones.
        RuntimeError: the backend cannot be imported here; the message says what to install.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    fix = BACKENDS[backend]
    if fix is None:
        return
    try:
        importlib.import_module(f"omni_kernels.backends.{backend}")
    except ImportError as error:
        raise RuntimeError(f"backend {backend!r} cannot be loaded ({error}); {fix}") from error
