"""The contract of every npu kernel with every pinned torch-npu release, as rows for a table."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_kernels.contract import schemas
from omni_kernels.contract.lint import Report, Site, lint, sources
from omni_kernels.contract.wheels import WHEELS, cache_folder, checkout, unpacked

TRIAL_LIMIT_S = 300
GATES = ("meta", "twin")


@dataclass(frozen=True, slots=True)
class ContractResult:
    """One op over all releases. `lint`, `meta` and `twin` are "ok" or the first problem.

    `lint`: its torch_npu calls against the schemas. `meta`: shapes and dtypes by the wheel's meta kernels. `twin`:
    numbers by the CPU twins. `cases` samples ran in each release; `unsupported` more are beyond what torch_npu
    documents, and the kernel refuses them. `calls`: the torch_npu ops it calls. `notes`: what the gates could not see.
    """

    lint: str
    meta: str
    twin: str
    cases: int
    unsupported: int
    calls: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.lint == self.meta == self.twin == "ok"


def texts() -> dict[str, Path]:
    """Folder of text files by version. Raises NoWheel when one cannot be had."""
    return {wheel.version: unpacked(wheel, cache_folder()) for wheel in WHEELS}


def lint_tree(folders: Mapping[str, Path]) -> Report:
    """Lint every source of the checkout, or of omni_kernels where it is installed alone.

    The contract's own files stay out: they call ops by names they read.
    """
    releases = {version: schemas.read(folder) for version, folder in folders.items()}
    own = Path(__file__).parent
    files = sources(checkout() or own.parent)
    return lint((file for file in files if own not in file.parents), releases)


def trials(folders: Mapping[str, Path], mutants: Sequence[Mapping[str, str]] = ()) -> dict[str, dict[str, Any]]:
    """Answers of `trial` by version, each from a process of its own, side by side.

    The wheels' meta kernels are tried in every release; the twins, which are the same for all, in the last only, and
    so are the `mutants` (fields of `trial.Mutant`).

    Raises:
        RuntimeError: one of them ended with an error; its last words are in the message.
    """
    asked: list[dict[str, Any]] = [{"texts": str(folder), "gates": ("meta",)} for folder in folders.values()]
    asked[-1] |= {"gates": GATES, "mutants": list(mutants)}
    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(zip(folders, pool.map(trial, asked), strict=True))


def contract_rows() -> dict[str, ContractResult]:
    """Result by op, for the ops that have an npu kernel. Takes about ten seconds once the wheels are cached.

    Raises:
        NoWheel: the text files of a pinned release cannot be had.
    """
    folders = texts()
    return rows(lint_tree(folders), trials(folders))


def rows(linted: Report, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, ContractResult]:
    """Join the lint and the trials of all releases into one result an op."""
    names = {name for answer in answers.values() for name in answer["kernels"]}
    return {name: _row([(v, a["kernels"][name]) for v, a in answers.items()], linted) for name in sorted(names)}


def never_run(linted: Report, answers: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Site]:
    """Calls in the sources below `folder` that no sample of any op reaches: the trials say nothing about them."""
    reached = {tuple(site) for answer in answers.values() for k in answer["kernels"].values() for site in k["sites"]}
    inside = (site for site in linted.sites if folder in site.file.parents)
    return [site for site in inside if (str(site.file), site.line, site.op) not in reached]


def _row(releases: Sequence[tuple[str, Mapping[str, Any]]], linted: Report) -> ContractResult:
    sites = {tuple(site) for _, kernel in releases for site in kernel["sites"]}
    files = {Path(kernel["file"]) for _, kernel in releases} | {Path(file) for file, _, _ in sites}
    notes = {note for _, kernel in releases for gate in GATES if gate in kernel for note in kernel[gate]["notes"]}
    return ContractResult(
        lint=next((str(finding) for finding in linted.findings if finding.file in files), "ok"),
        meta=_first_problem(releases, "meta"),
        twin=_first_problem(releases, "twin"),
        cases=releases[-1][1]["twin"]["cases"],
        unsupported=releases[-1][1]["twin"]["unsupported"],
        calls=tuple(sorted({op for _, _, op in sites})),
        notes=tuple(sorted(notes)),
    )


def _first_problem(releases: Sequence[tuple[str, Mapping[str, Any]]], gate: str) -> str:
    for version, kernel in releases:
        if gate not in kernel:
            continue
        if kernel[gate]["failures"]:
            return f"{kernel[gate]['failures'][0]} [{version}]"
        if not kernel[gate]["cases"]:
            return f"no sample could be run [{version}]"
    return "ok"


def trial(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer of one `trial` process. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "omni_kernels.contract.trial"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TRIAL_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the contract's trial failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
