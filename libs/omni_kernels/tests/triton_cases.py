"""The Triton kernels on chosen cases, in a process of its own; prints JSON lines.

`TRITON_INTERPRET=1 python triton_cases.py interpret` holds them to the float64 meaning, one row of conformance a line.
`python triton_cases.py compile` compiles them for an NVIDIA GPU of compute capability 9.0, which it needs not have: a
line says kernel, shared memory in bytes and whether tensor cores are used.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch

from omni_kernels.case import Case
from omni_kernels.conformance import rows
from omni_kernels.load import kernels_of
from omni_kernels.ops import OPS
from omni_kernels.ops.grouped_matmul import pack_int4
from omni_kernels.ops.moe_gate import spare_copies
from omni_kernels.ops.paged_samples import Batch

CPU = torch.device("cpu")
FLOAT32 = (2e-5, 2e-5)

KEPT = {
    "grouped_matmul": "deepseek.*bfloat16",
    "grouped_matmul_w8a8": "qwen3",
    "grouped_matmul_w4a8": "none",
    "kv_gather_int8": "deepseek.*bfloat16",
    "kv_scatter_int8": "deepseek.*bfloat16",
    "mla_attention": "16-heads-decode",
    "moe_experts": "none",
    "moe_gate": "deepseek.*(float32|copies)|not-renormalized",
    "moe_permute": "rank-of-four|int8",
    "moe_combine": "rank-of-four",
    "paged_attention": "30b.*decode",
    "sink_recent_attention": "16-100-decode",
    "indexer_top_k": "128-decode-bfloat16",
    "sparse_mla_attention": "16-heads-2048-decode-float32",
    "top_k_top_p": "none",
    "sample": "none",
    "speculative_verify": "mtp",
}
"""Of the samples in a model's own sizes, those the interpreter takes a second or so for, or all."""
SKIPPED = {
    "grouped_matmul_w4a8": "12x.*-float32|-float16",
    "mla_attention": "tiny.*(prefill|mixed-float32)",
    "moe_experts": "many-rows|-float16|tiny-float32",
    "sample": "tiny|all on",
    "sink_recent_attention": "tiny-(0-8|3-0)-(decode|prefill)|tiny.*prefill|decode-float32",
    "sparse_mla_attention": "tiny.*(prefill|mixed-bfloat16)",
    "indexer_top_k": "tiny.*prefill",
    "top_k_top_p": "tiny|one row",
    "paged_attention": "30b.*float32|tiny-prefill-bfloat16",
}
"""Small ones like others of their op."""
LARGE = re.compile("qwen3|deepseek|pangu")
COMPILED = "deepseek.*(bfloat16|copies|drawn|int32)|30b.*mixed-bfloat16"


def samples(name: str) -> Iterator[Case]:
    for case in OPS[name].samples(CPU):
        chosen = not LARGE.search(case.name) or re.search(KEPT.get(name, "."), case.name)
        if chosen and not re.search(SKIPPED.get(name, "^$"), case.name):
            yield case
    yield from (Case(f"{name}-{label}", inputs, *FLOAT32) for label, inputs in EDGES.get(name, lambda: ())())


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def attention(*window: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Heads in groups of three, sizes and blocks that are no powers of two, strided caches, keys split and merged."""
    for label, batch in (
        ("one long decode", Batch("", (1,), (1100,), 10)),
        ("ragged", Batch("", (1, 0, 40, 3), (33, 5, 41, 3), 10)),
    ):
        generator = torch.Generator().manual_seed(1)
        cache = normal(batch.num_blocks, 2, 10, 64).transpose(1, 2)
        queries = normal(batch.tokens, 6, 24)
        yield label, (queries, cache[..., :24], cache[..., 24:], *batch.paging(generator, CPU), 0.3, *window)


def products() -> Iterator[tuple[str, tuple[Any, ...]]]:
    sizes = torch.tensor([0, 20, 0, 1, 33])
    yield "odd sizes", (normal(60, 100), normal(5, 100, 130) / 10, sizes)


def products_int4() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Scales for 48 rows each, which is no power of two; 34 columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (9, 96), generator=generator, dtype=torch.int8)
    weight = pack_int4(torch.randint(-7, 8, (3, 96, 34), generator=generator, dtype=torch.int8))
    scale = torch.rand(3, 2, 34, generator=generator) / 100
    yield "48 rows a scale", (x, normal(9).abs() / 60, weight, scale, torch.tensor([4, 0, 3]), torch.float32)


def routing() -> Iterator[tuple[str, tuple[Any, ...]]]:
    copies = spare_copies(12, 5, torch.Generator().manual_seed(0))
    bias = normal(12) / 10
    yield "three groups of four", (normal(9, 12), bias, 3, "sigmoid", 3, 2, True, 2.5, copies.long(), 17, 11, None)


def pairs() -> Iterator[tuple[str, tuple[Any, ...]]]:
    slots = torch.randint(-1, 9, (150, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    yield "several chunks", (normal(150, 20), slots, 7)


def strided() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "strided", (normal(5, 2, 6, 20).transpose(1, 2)[..., 3:13], torch.tensor([4, 0]))


def choices() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rows longer than a program's block, with logits that are equal across blocks."""
    logits = (normal(3, 9000) * 8).round()
    yield "long rows with ties", (logits, torch.tensor([40, 0, 2000], dtype=torch.int32), torch.tensor([1.0, 0.7, 0.9]))


EDGES = {
    "paged_attention": attention,
    "sink_recent_attention": lambda: attention(13, 37),
    "grouped_matmul": products,
    "grouped_matmul_w4a8": products_int4,
    "moe_gate": routing,
    "moe_permute": pairs,
    "kv_gather": strided,
    "kv_gather_int8": strided,
    "top_k_top_p": choices,
}


def interpret() -> None:
    torch.set_num_threads(1)
    kernels = kernels_of("triton")
    for name, op in OPS.items():
        chosen = replace(op, samples=lambda _, name=name: samples(name))
        for row in rows(chosen, {"triton": kernels[name]}, CPU) if name in kernels else ():
            print(json.dumps(asdict(row)), flush=True)


def compile_all() -> None:
    """Launches become compilations up to the machine's own code; what they would have computed is left undone."""
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _device: 0
        )
    )
    add_stages, launch = backends["nvidia"].compiler.add_stages, triton.JITFunction.run

    def stop_at_ptx(self: Any, stages: dict[str, Any], *rest: Any) -> None:
        add_stages(self, stages, *rest)
        stages["cubin"] = lambda _ptx, _metadata: b""

    def compile_only(self: Any, *arguments: Any, **options: Any) -> None:
        compiled = launch(self, *arguments, **{**options, "warmup": True})
        mma = re.search(r"wgmma\.mma|mma\.sync", compiled.asm["ptx"]) is not None
        line = {"kernel": self.__name__, "shared": compiled.metadata.shared, "tensor_cores": mma}
        print(json.dumps(line | {"op": running[0]}), flush=True)

    backends["nvidia"].compiler.add_stages = stop_at_ptx
    triton.JITFunction.run = compile_only
    running = [""]
    for name, kernel in kernels_of("triton").items():
        running[0] = name
        cases = list(OPS[name].samples(CPU))
        chosen = [case for case in cases if re.search(COMPILED, case.name)] or cases
        kernel(*max(chosen, key=lambda case: sum(x.numel() for x in case.inputs if isinstance(x, torch.Tensor))).inputs)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
