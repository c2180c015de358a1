"""One module per op: its meaning in plain torch, its fake form, its samples. `OPS` lists them all."""

from collections.abc import Mapping

from omni_kernels.case import Op
from omni_kernels.ops import rms_norm, swiglu

OPS: Mapping[str, Op] = {op.name: op for op in (rms_norm.OP, swiglu.OP)}
