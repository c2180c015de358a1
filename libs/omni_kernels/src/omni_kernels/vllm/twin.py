"""The twin's platform and worker. Imported by vLLM, once it has resolved its platform."""

import os
from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum

from omni_kernels.vllm.parts import KERNELS_VARIABLE


class TwinPlatform(CpuPlatform):  # type: ignore[misc]
    """An out-of-tree platform whose device is the CPU."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        if vllm_config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
            vllm_config.parallel_config.worker_cls = "omni_kernels.vllm.twin_worker.TwinWorker"

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from omni_kernels.vllm.attention import PATHS

        if "attention" not in os.environ[KERNELS_VARIABLE].split(","):
            path: str = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
            return path
        return PATHS["CPU_MLA" if attn_selector_config.use_mla else "OMNI"]

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Ours are registered by the general plug-in, in every process."""
