"""Static check of every torch_npu call in a tree against the schemas of each pinned release; nothing is imported."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_kernels.contract.schemas import Schemas

SKIPPED_FOLDERS = frozenset({"node_modules", "dist", "wheels", "__pycache__"})
# What torch_npu offers besides its ops; it has no schema to check against.
PLAIN_NAMES = frozenset({"npu", "__version__"})
# Kinds of schema types a literal of each Python type may be given for; `None` only where the type is optional.
_LITERALS: Mapping[type, frozenset[str]] = {
    str: frozenset({"StringType", "DeviceObjType"}),
    bool: frozenset({"BoolType", "IntType", "FloatType", "NumberType"}),
    int: frozenset({"IntType", "SymIntType", "FloatType", "NumberType", "ScalarTypeType"}),
    float: frozenset({"FloatType", "NumberType"}),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A torch_npu call that some release would refuse, or that cannot be checked (then `version` is empty)."""

    file: Path
    line: int
    op: str
    version: str
    problem: str

    def __str__(self) -> str:
        release = f" [{self.version}]" if self.version else ""
        return f"{self.file}:{self.line}: {self.op}: {self.problem}{release}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where an op is called."""

    file: Path
    line: int
    op: str


@dataclass(frozen=True, slots=True)
class Report:
    sites: Sequence[Site]
    findings: Sequence[Finding]


def sources(root: Path) -> Iterator[Path]:
    """Python files under `root`, without hidden folders and built or fetched ones."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name in SKIPPED_FOLDERS:
            continue
        if path.is_dir():
            yield from sources(path)
        elif path.suffix == ".py":
            yield path


def lint(files: Iterable[Path], releases: Mapping[str, Schemas]) -> Report:
    """Check the calls in `files` against every release; `releases` maps a version to its schemas."""
    sites: list[Site] = []
    findings: list[Finding] = []
    for file in files:
        text = file.read_text()
        if "torch_npu" not in text and "ops.npu" not in text:
            continue
        try:
            found = _File(file, ast.parse(text, str(file)))
        except SyntaxError as error:
            findings.append(Finding(file, error.lineno or 0, "torch_npu", "", "the file cannot be parsed"))
            continue
        findings += found.findings
        for site, call in found.calls:
            sites.append(site)
            for version, schemas in releases.items():
                problem = problem_of(call, schemas.get(site.op, ()))
                if problem:
                    findings.append(Finding(file, site.line, site.op, version, problem))
    return Report(sites, findings)


def problem_of(call: ast.Call, overloads: Sequence[torch.FunctionSchema]) -> str:
    """Why none of `overloads` takes `call`, or "" when one does. The overload that comes nearest is told about."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        return "is called with * or **, which cannot be checked"
    if not overloads:
        return "no such op"
    return min((_mismatch(call, schema) for schema in overloads), key=lambda found: (bool(found), found))


def _mismatch(call: ast.Call, schema: torch.FunctionSchema) -> str:
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    if len(call.args) > len(positional):
        return f"takes {len(positional)} positional arguments, not {len(call.args)}"
    given = dict(zip((argument.name for argument in positional), call.args, strict=False))
    known = {argument.name: argument for argument in schema.arguments}
    for keyword in call.keywords:
        name = str(keyword.arg)
        if name not in known:
            return f"has no argument {name!r}"
        if name in given:
            return f"argument {name!r} is given twice"
        given[name] = keyword.value
    for argument in schema.arguments:
        if argument.name not in given and not argument.has_default_value():
            return f"argument {argument.name!r} is missing"
    wrong = (name for name, value in given.items() if not _fits(value, known[name].type))
    return next((f"argument {name!r} is {known[name].type}" for name in wrong), "")


def _fits(value: ast.expr, wanted: Any) -> bool:
    if not isinstance(value, ast.Constant):
        return True
    optional = bool(wanted.kind() == "OptionalType")
    if value.value is None:
        return optional
    kind = (wanted.getElementType() if optional else wanted).kind()
    return bool(kind in _LITERALS.get(type(value.value), frozenset()))


class _File(ast.NodeVisitor):
    """Calls of torch_npu's ops in one file, and uses of it that hide calls."""

    def __init__(self, file: Path, tree: ast.Module) -> None:
        self.file = file
        self.aliases = {"torch_npu"}
        self.calls: list[tuple[Site, ast.Call]] = []
        self.findings: list[Finding] = []
        self._called: set[ast.expr] = set()
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        self.aliases |= {name.asname for name in node.names if name.name == "torch_npu" and name.asname}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] == "torch_npu":
            self._refuse(node, "torch_npu", "import the module itself, so that its calls can be seen")

    def visit_Call(self, node: ast.Call) -> None:
        target = node.func
        if isinstance(target, ast.Attribute) and target.attr == "default":
            target = target.value
        op = self._op(target)
        if op is not None:
            self._called.add(target)
            self.calls.append((Site(self.file, node.lineno, op), node))
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args and self._is_root(node.args[0]):
            self._refuse(node, "torch_npu", "an op chosen by getattr cannot be checked")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._op(node) is not None and node not in self._called:
            self._refuse(node, node.attr, "is not called where it is named, so its arguments cannot be checked")
        self.generic_visit(node)

    def _op(self, node: ast.expr) -> str | None:
        """Name of the op that `node` denotes, or None."""
        if not isinstance(node, ast.Attribute) or not self._is_root(node.value) or node.attr in PLAIN_NAMES:
            return None
        return node.attr

    def _is_root(self, node: ast.expr) -> bool:
        text = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        return text in self.aliases or text == "torch.ops.npu"

    def _refuse(self, node: ast.expr | ast.stmt, op: str, problem: str) -> None:
        self.findings.append(Finding(self.file, node.lineno, op, "", problem))
