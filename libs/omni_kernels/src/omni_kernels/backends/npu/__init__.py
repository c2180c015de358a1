"""Ascend kernels through torch_npu. Importing this package needs torch_npu and registers every kernel in it."""

from omni_kernels.backends.npu import rms_norm, swiglu

KERNELS = (rms_norm, swiglu)
