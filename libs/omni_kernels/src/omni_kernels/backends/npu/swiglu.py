import torch_npu
from torch import Tensor

from omni_kernels.ops.swiglu import swiglu


@swiglu.register_kernel("npu")
def _(gate_up: Tensor) -> Tensor:
    activated: Tensor = torch_npu.npu_swiglu(gate_up)
    return activated
