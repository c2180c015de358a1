"""Expert layers on int8 weights and activations, out of Omni's ops."""

from torch import Tensor

from omni_kernels.ops.grouped_matmul import grouped_matmul_w8a8
from omni_kernels.ops.moe_permute import moe_combine, moe_permute
from omni_kernels.ops.quant import dynamic_quant
from omni_kernels.ops.swiglu import swiglu_quant


def int8_experts(
    x: Tensor, w13: Tensor, scale13: Tensor, w2: Tensor, scale2: Tensor, weights: Tensor, experts: Tensor
) -> Tensor:
    """The experts' weighted sum for x (T, H), in its dtype.

    w13 is int8 (E, 2I, H), gate before up, w2 int8 (E, H, I); their scales float32 (E, 2I) and (E, H). `weights` and
    `experts` are (T, k).
    """
    codes, scale = dynamic_quant(x.contiguous())
    rows, source, sizes = moe_permute(codes, experts.int().contiguous(), len(w13))
    row_scale = scale[source.long() // experts.shape[1]]
    joined = grouped_matmul_w8a8(rows, row_scale, w13.transpose(1, 2), scale13, sizes, x.dtype)
    inner, inner_scale = swiglu_quant(joined)
    done = grouped_matmul_w8a8(inner, inner_scale, w2.transpose(1, 2), scale2, sizes, x.dtype)
    result: Tensor = moe_combine(done, source, weights.float().contiguous(), None)
    return result
