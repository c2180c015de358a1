"""The twin of an out-of-tree platform, for tests: vLLM takes the code paths it takes on Ascend, on a CPU.

What `is_out_of_tree()` switches is switched: layers run `forward_oot`, expert layers have no backend of vLLM's own and
take our method and router, norms and attention come from us. The device, its memory and its workers are the CPU's.
Nobody gets it by accident: only the setting `platform: twin` sets the two variables that it asks for.
"""

import os

from omni_kernels.vllm.parts import KERNELS_VARIABLE, PLATFORM_VARIABLE


def register() -> str | None:
    """vLLM's `platform_plugins` hook: where the platform is, or None where it was not asked for."""
    is_asked_for = os.environ.get(PLATFORM_VARIABLE) == "twin" and bool(os.environ.get(KERNELS_VARIABLE))
    return "omni_kernels.vllm.twin.TwinPlatform" if is_asked_for else None
