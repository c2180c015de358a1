"""Gathers the table of `make kernels`: every op on every backend this machine has, and the Ascend contract."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from omni_kernels.conformance import Row, measure, measure_apart, rows
from omni_kernels.contract.report import ContractResult, contract_rows
from omni_kernels.contract.wheels import NoWheel
from omni_kernels.load import BACKENDS, MEANING, kernels_of
from omni_kernels.ops import OPS

SOURCES = (MEANING, *BACKENDS)
"""What `--backend` takes."""

INTERPRETER_S = 2.0
"""For the cases of one op in Triton's interpreter."""

Told = Callable[[str, str], None]
"""Told of what is done: source, op."""


@dataclass(slots=True)
class Table:
    """`rows` in the order of the ops; `contract` by op, for the npu kernels.

    `absent`: what was not run and why; `broken`: what ended before its last op, with its last words.
    """

    rows: list[Row] = field(default_factory=list)
    contract: dict[str, ContractResult] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        measured = [f"{row.op} on {row.backend}: {problem}" for row in self.rows for problem in row.failures]
        contract = [
            f"{op} on npu, {gate}: {word}"
            for op, result in self.contract.items()
            for gate, word in (("lint", result.lint), ("meta", result.meta), ("twin", result.twin))
            if word != "ok"
        ]
        return measured + contract + [f"{source}: {words}" for source, words in self.broken.items()]


def gather(names: Sequence[str], backends: Sequence[str], told: Told) -> Table:
    """Measure the ops `names` on `backends`, telling `told` as they are done.

    Triton's kernels run on a GPU where there is one, else in the interpreter, npu kernels on an NPU; where there is
    none, npu has its contract only.
    """
    table = Table()
    backends = [backend for backend in backends if not _missing(table, backend)]
    with ThreadPoolExecutor(2) as pool:
        work: list[Future[None]] = []
        if "npu" in backends or "npu" in table.absent:
            work.append(pool.submit(_contract, table, names, told))
        if "triton" in backends and not torch.cuda.is_available():
            work.append(
                pool.submit(_collect, table, "triton", measure_apart("triton", "cpu", names, INTERPRETER_S), told)
            )
        with one_thread():
            _here(table, names, backends, told)
        for future in work:
            future.result()
    order = {name: place for place, name in enumerate(OPS)}
    table.rows.sort(key=lambda row: (order[row.op], SOURCES.index(row.backend)))
    return table


@contextmanager
def one_thread() -> Iterator[None]:
    """Small cases beside other processes take longer on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _missing(table: Table, backend: str) -> bool:
    """Whether this machine cannot run `backend`; why not is noted."""
    try:
        if backend != MEANING:
            kernels_of(backend)
    except RuntimeError as error:
        table.absent[backend] = str(error)
    else:
        if backend == "npu" and not torch.get_device_module("npu").is_available():
            table.absent[backend] = "no NPU here"
    return backend in table.absent


def _here(table: Table, names: Sequence[str], backends: Sequence[str], told: Told) -> None:
    """What this process can run: the meaning and cpu kernels side by side, and kernels of devices that are there."""
    kernels = kernels_of("cpu") if "cpu" in backends else {}
    for name in names:
        both = {MEANING: OPS[name].meaning} if MEANING in backends else {}
        both |= {"cpu": kernels[name]} if name in kernels else {}
        if both:
            table.rows += rows(OPS[name], both, torch.device("cpu"))
            told("cpu", name)
    if "triton" in backends and torch.cuda.is_available():
        _collect(table, "triton", measure("triton", "cuda", names), told)
    if "npu" in backends:
        _collect(table, "npu", measure("npu", "npu", names), told)


def _collect(table: Table, backend: str, found: Iterator[Row], told: Told) -> None:
    try:
        for row in found:
            table.rows.append(row)
            told(backend, row.op)
    except RuntimeError as error:
        table.broken[backend] = str(error)


def _contract(table: Table, names: Sequence[str], told: Told) -> None:
    try:
        table.contract = {name: result for name, result in contract_rows().items() if name in names}
    except NoWheel as error:
        table.absent["npu contract"] = str(error)
    except RuntimeError as error:
        table.broken["npu contract"] = str(error)
    told("npu contract", "all ops")
