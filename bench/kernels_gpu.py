"""Omni's Triton ops on an NVIDIA GPU beside plain torch, torch.compile and public kernels, and their part of the roof.

python bench/kernels_gpu.py --quick
python bench/kernels_gpu.py --json kernels_gpu.json

The roof is what this GPU reached in the same run: the bandwidth of a copy, the rate of torch's own matrix products.
Whether the ops are right there says `python -m omni_kernels.conformance triton cuda`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from sidebyside.machine import machine

PACKAGES = ("torch", "triton", "omni-kernels", "vllm", "flashinfer-python", "flash-attn", "flash-mla")
HEADINGS = ("op", "case", "tokens", "omni us", "of roof", "torch us", "compile us", "public us", "public kernel")
TOKENS, QUICK_TOKENS = (1, 64, 4096), (64,)
NO_GPU = "no CUDA device is visible here; on a machine with an NVIDIA GPU install torch for CUDA and run this again"


@dataclass(frozen=True, slots=True)
class Row:
    """Median microseconds on the GPU; None where a contender could not run, `notes` say why.

    `roof` is the least time the work can take on this GPU over the time of ours. `public` is the fastest of `rival`s.
    """

    op: str
    case: str
    tokens: int
    omni_us: float
    roof: float
    torch_us: float | None
    compile_us: float | None
    public_us: float | None
    rival: str
    notes: tuple[str, ...]


def measure(ops: Sequence[str], tokens: Sequence[int], repeats: int, roof: Any) -> Iterator[Row]:
    """One row for each op the backend has a kernel for, case and number of tokens."""
    from kernelbench.gpu_inputs import depends_on_tokens, gpu_inputs_of

    from omni_kernels.load import active
    from omni_kernels.ops import OPS

    for name in ops or sorted(op for op, backend in active("cuda").items() if backend == "triton"):
        for count in tokens if depends_on_tokens(name) else tokens[:1]:
            for case, inputs in gpu_inputs_of(name, count).items():
                yield _row(OPS[name], case, count, inputs, repeats, roof)


def _row(op: Any, case: str, tokens: int, inputs: tuple[Any, ...], repeats: int, roof: Any) -> Row:
    import torch
    from kernelbench.gpu import median_s
    from kernelbench.gpu_rivals import RIVALS
    from kernelbench.roofline import work_of

    result = op.call(*inputs)
    results = [result] if isinstance(result, torch.Tensor) else list(result or ())
    work = work_of(op.name, inputs, results)
    seconds = median_s(lambda: op.call(*inputs), repeats)
    notes: list[str] = []

    def time(name: str, prepare: Callable[[], Callable[[], Any]]) -> float | None:
        try:
            return median_s(prepare(), repeats) * 1e6
        except Exception as error:
            notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return None

    plain = time("torch", lambda: lambda: op.meaning(*inputs))
    compiled_meaning = torch.compile(op.meaning, dynamic=False)
    compiled = time("compile", lambda: lambda: compiled_meaning(*inputs))
    public = {
        name: time(name, lambda make=make: make(*inputs))  # type: ignore[misc]
        for name, make in RIVALS.get(op.name, {}).items()
    }
    ran = {name: us for name, us in public.items() if us is not None}
    rival = min(ran, key=lambda name: ran[name], default="-")
    return Row(
        op.name, case, tokens, seconds * 1e6, roof.fraction(work, seconds), plain, compiled,
        ran.get(rival), rival, tuple(notes),
    )  # fmt: skip


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        others = ("-" if us is None else f"{us:.1f}" for us in (row.torch_us, row.compile_us, row.public_us))
        table.add_row(row.op, row.case, str(row.tokens), f"{row.omni_us:.1f}", f"{row.roof:.0%}", *others, row.rival)
    console.print(table, highlight=False)
    for note in sorted({f"{row.op}: {note}" for row in rows for note in row.notes}):
        console.print(note, highlight=False, markup=False)


def main(
    op: Annotated[list[str] | None, typer.Option(help="Only these ops.")] = None,
    quick: Annotated[bool, typer.Option(help="One number of tokens, few repeats.")] = False,
    repeats: Annotated[int, typer.Option(min=3, help="Calls of which the median is taken.")] = 50,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    import torch

    if not torch.cuda.is_available():
        typer.echo(NO_GPU, err=True)
        raise typer.Exit(2)
    from kernelbench.gpu import measure_roof

    from omni_kernels.load import load

    load("triton", "cuda")
    console = Console(width=180)
    properties = torch.cuda.get_device_properties(0)
    facts = {**machine(PACKAGES), "gpu": properties.name, "processors": properties.multi_processor_count}
    console.print_json(json.dumps(facts))
    with torch.inference_mode():
        roof = measure_roof(repeats)
        rates = {str(dtype).removeprefix("torch."): rate / 1e12 for dtype, rate in roof.operations_per_s.items()}
        reached = ", ".join(f"{name} {rate:.0f} T/s" for name, rate in rates.items())
        console.print(f"roof: {roof.bytes_per_s / 1e12:.2f} TB/s; {reached}")
        rows = list(measure(op or (), QUICK_TOKENS if quick else TOKENS, 10 if quick else repeats, roof))
    show(rows, console)
    if out is not None:
        roofs = {"bytes_per_s": roof.bytes_per_s, "tera_operations_per_s": rates}
        out.write_text(json.dumps({"machine": facts, "roof": roofs, "ops": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    typer.run(main)
