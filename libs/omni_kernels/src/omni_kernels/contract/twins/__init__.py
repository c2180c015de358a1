"""What torch_npu's ops compute, restated in plain torch from the wheels' own documentation (`_op_plugin_docs.py`).

Registered for CPU under the real op names they let the kernels of `backends.npu` run on CPU tensors as they stand.
They state what an op does, not what a kernel here needs of it: what is documented as not allowed is refused, what is
documented as undefined is NaN or -77, and arguments no kernel uses are refused, not ignored.
`TWINS`: name of the op -> function. `UNDEFINED`: outputs of no meaning as the kernels call the op; their shapes differ
between releases.
"""

from collections.abc import Callable, Mapping
from typing import Any

from omni_kernels.contract.twins import activations, attention, caches, moe, norms

Twin = Callable[..., Any]
TWINS: Mapping[str, Twin] = {
    name: twin for family in (activations, attention, caches, moe, norms) for name, twin in family.TWINS.items()
}
UNDEFINED: Mapping[str, tuple[int, ...]] = {
    "npu_add_rms_norm_dynamic_quant": (1, 4),
    "npu_fused_infer_attention_score": (1,),
    "npu_fused_infer_attention_score_v2": (1,),
    "npu_lightning_indexer": (1,),
    "npu_sparse_flash_attention": (1, 2),
}
