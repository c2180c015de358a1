"""Loads and layouts as files. What is read is checked; what is written is written whole.

load    .npy (layers, experts); OmniPlacement's .csv, log and dump folder
layout  .npy int32 0/1 (ranks, layers, experts): which rank holds which expert
        .json the same with slots, topology, solver and version
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_placement.layout import Layout, Topology, from_indicator
from omni_placement.load import Phase, imports
from omni_placement.problem import Loads

JSON_FORMAT = "omni-layout-1"


@dataclass(frozen=True, slots=True)
class Named:
    """A layout and where it comes from; version 0 was never published."""

    layout: Layout
    model: str = ""
    group: str = ""
    version: int = 0
    solver: str = ""


def read_load(path: Path, phase: Phase | None = None) -> Loads:
    """Tokens as float64 (layers, experts).

    Raises:
        InvalidRequest: not readable as one of the formats; names the file and what is wrong.
    """
    if path.suffix != ".npy":
        return imports.read(path, phase).astype(np.float64)
    array = _array(path)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise _unreadable(path, f"holds {array.dtype} {array.shape}; a load is numbers (layers, experts)")
    load = array.astype(np.float64)
    if not np.isfinite(load).all() or (load < 0).any():
        raise _unreadable(path, "has counts that are negative or not finite")
    if (load > imports.LARGEST).any():
        raise _unreadable(path, "has counts larger than 2**48")
    return load


def write_load(path: Path, load: Loads) -> None:
    """`.npy`, or `.csv` as OmniPlacement's tools read it: whole tokens.

    Raises:
        InvalidRequest: another ending.
    """
    if path.suffix == ".npy":
        whole = load.astype(np.int64) if (load == np.round(load)).all() else load
        _replace(path, lambda draft: _save(draft, whole))
    elif path.suffix == ".csv":
        _replace(path, lambda draft: imports.write_csv(draft, np.round(load).astype(np.int64)))
    else:
        raise InvalidRequest(f"{path}: write a load as .npy or .csv", field="file")


def read_layout(path: Path, topology: Topology | None = None) -> Named:
    """A layout. An array says nothing of hosts, sizes and spare slots: they come from `topology` where it is given.
    Else ranks that hold nothing in any layer are taken for ranks of the shared expert.

    Raises:
        InvalidRequest: not one of the formats, or no valid layout, or not one of that topology.
    """
    if path.suffix == ".json":
        named = _from_json(path)
    elif path.suffix == ".npy":
        named = Named(_from_array(path))
    else:
        raise _unreadable(path, "a layout is a .npy or .json file")
    return named if topology is None else replace(named, layout=under(named.layout, topology, path))


def under(layout: Layout, topology: Topology, origin: Path | str) -> Layout:
    """The same with another topology of these ranks; slots stay where as many are asked for.

    Raises:
        InvalidRequest: other layers, experts or ranks, or too few slots; `origin` is named.
    """
    mine = layout.topology
    if (mine.num_layers, mine.num_experts, mine.num_ranks) != (
        topology.num_layers, topology.num_experts, topology.num_ranks,
    ):  # fmt: skip
        raise _unreadable(
            origin,
            f"has {mine.num_layers} layers of {mine.num_experts} experts on {mine.num_ranks} ranks; asked for were "
            f"{topology.num_layers} of {topology.num_experts} on {topology.num_ranks}",
        )
    if mine.slots_per_rank == topology.slots_per_rank:
        return Layout(topology, layout.physical)
    try:
        return Layout(topology, from_indicator(layout.indicator, topology.slots_per_rank).physical)
    except InvalidRequest as error:
        raise _unreadable(origin, error.message) from error


def write_layout(path: Path, named: Named) -> None:
    """By the ending: `.npy` or `.json`. Raises `InvalidRequest` for another one."""
    if path.suffix == ".npy":
        _replace(path, lambda draft: _save(draft, named.layout.indicator))
    elif path.suffix == ".json":
        _replace(path, lambda draft: draft.write_text(json.dumps(_to_json(named)) + "\n", encoding="utf-8"))
    else:
        raise InvalidRequest(f"{path}: write a layout as .npy or .json", field="file")


def check_ending(path: Path | None, *endings: str) -> None:
    """Raises `InvalidRequest` before long work whose result could not be written."""
    if path is not None and path.suffix not in endings:
        raise InvalidRequest(f"{path} must end in {' or '.join(endings)}", field="file")
    if path is not None and not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent} is no folder; make it first", field="file")


def is_layout(path: Path) -> bool:
    """Whether a file holds a layout; anything else may be a load."""
    return path.suffix == ".json" or (path.suffix == ".npy" and _array(path).ndim == 3)


def _from_array(path: Path) -> Layout:
    array = _array(path)
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        raise _unreadable(path, f"holds {array.dtype} {array.shape}; a layout is 0/1 integers (ranks, layers, experts)")
    if not np.isin(array, (0, 1)).all():
        raise _unreadable(path, "holds other numbers than 0 and 1")
    try:
        plain = from_indicator(array.astype(np.int32))
    except InvalidRequest as error:
        raise _unreadable(path, error.message) from error
    unused = tuple(int(rank) for rank in np.flatnonzero(array.sum(axis=(1, 2)) == 0))
    return Layout(replace(plain.topology, shared_ranks=unused), plain.physical)


def _from_json(path: Path) -> Named:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != JSON_FORMAT:
            raise _unreadable(path, f"format {content['format']!r} is not {JSON_FORMAT!r}")
        topology = Topology(**content["topology"])
        layout = Layout(topology, np.array(content["physical"], dtype=np.int32))
        return Named(layout, content["model"], content["group"], int(content["version"]), content["solver"])
    except InvalidRequest as error:
        raise _unreadable(path, error.message) from error
    except OSError as error:
        raise _unreadable(path, error.strerror or "cannot be read") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _unreadable(path, f"is no layout ({type(error).__name__}: {error})") from error


def _to_json(named: Named) -> dict[str, Any]:
    return {
        "format": JSON_FORMAT,
        "model": named.model,
        "group": named.group,
        "version": named.version,
        "solver": named.solver,
        "topology": asdict(named.layout.topology),
        "physical": named.layout.physical.tolist(),
    }


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except OSError as error:
        raise _unreadable(path, error.strerror or "cannot be read") from error
    except (ValueError, EOFError) as error:
        raise _unreadable(path, f"is no .npy array ({error})") from error
    return array


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    draft = path.with_name(f"{path.name}.draft")
    try:
        write(draft)
        draft.replace(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}", field="file") from error


def _unreadable(path: Path | str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {message}", field="file", reason="bad_file")
