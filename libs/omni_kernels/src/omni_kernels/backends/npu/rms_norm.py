import torch_npu
from torch import Tensor

from omni_kernels.ops.rms_norm import rms_norm


@rms_norm.register_kernel("npu")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, eps)[0]
    return normed
