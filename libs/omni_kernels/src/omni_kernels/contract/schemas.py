"""Schemas of torch_npu's own ops, as the YAML files of a wheel state them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

FILES = ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml")
NAMESPACE = "npu"

Schemas = Mapping[str, Sequence[torch.FunctionSchema]]
"""Overloads by the op's name without namespace."""

# torch_npu registers every argument that the files call `self` under the name `input`.
_SELF = re.compile(r"(?<=[ \])])self(?=[,)=])")


def declarations(texts: Path) -> tuple[str, ...]:
    """Schemas of torch_npu's own ops without namespace, each once, in the order of the files under `texts`.

    Left out, as no kernel here calls one: overloads that write to an `out` argument, which torch_npu registers under
    other signatures, and those with named dimensions, which torch cannot parse.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: list[str] = []
    for name in FILES:
        content: Mapping[str, Any] = yaml.load((texts / "torch_npu/csrc/aten" / name).read_text(), Loader=loader)
        for section in ("custom", "quant"):
            found += [_SELF.sub("input", entry["func"]) for entry in content.get(section) or ()]
    return tuple(s for s in dict.fromkeys(found) if not s.partition("(")[0].endswith("out") and "Dimname" not in s)


def read(texts: Path) -> Schemas:
    """The declarations under `texts`, parsed."""
    schemas: dict[str, list[torch.FunctionSchema]] = {}
    for declaration in declarations(texts):
        schema = torch._C.parse_schema(f"{NAMESPACE}::{declaration}")
        schemas.setdefault(schema.name.partition("::")[2], []).append(schema)
    return schemas
