# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, in one file that changes whole or not at all.

Tensors (model, optimiser, ADMM's Z and U) are the file's tensors; everything else is JSON in its header. One file and
one rename: whatever moment a run is killed at, the file is the last complete one. Accelerate's own ``save_state`` is
not used because it pickles, writes several files, and saves states of generators, which a run does not have (see
:mod:`gohsp.training.seeds`). Neither has it a scheduler's: timm's are functions of the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gohsp.files import check_keys, cut, parse_json, replacing, shown
from gohsp.serialization import digest_tensors

T = TypeVar("T")

FORMAT = 1
_HEADER = "gohsp_training"
_SHA256 = "tensors_sha256"
_KINDS: dict[str, type] = {"format": int, "stage": str, "step": int, "done": bool, "values": dict}


@dataclass(frozen=True)
class Checkpoint:
    """State of a run between two steps.

    Attributes:
        stage: Name of the stage.
        step: Steps of the stage that are done.
        done: Whether the stage is over.
        tensors: By name; "model.", "optimizer." and "admm." lead.
        values: Plain values, as JSON has them.
    """

    stage: str
    step: int
    done: bool
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with ``name.``, without that start."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}

    def value(self, name: str, kind: type[T]) -> T:
        """Return one of the plain values.

        Raises:
            ValueError: It is not there, or of another kind.
        """
        found = self.values.get(name)
        if not isinstance(found, kind):
            raise ValueError(f"checkpoint: {name}: wanted a {kind.__name__}, got {shown(found)}")
        return found


def write(path: Path, state: Checkpoint) -> None:
    """Write a checkpoint beside its place, make sure that it is on the disk, and rename it."""
    header = {"format": FORMAT, "stage": state.stage, "step": state.step, "done": state.done, "values": state.values}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    header = json.loads(json.dumps(header))  # as it will be read: keys are strings, tuples lists
    header[_SHA256] = _digest(header, tensors)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def read(path: Path) -> Checkpoint:
    """Read a checkpoint into memory: what happens to the file afterwards does not reach it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a checkpoint of this format, or damaged.
    """
    if path.exists() and not path.is_file():  # to open a pipe would wait for a writer
        raise ValueError(f"{path}: wanted a checkpoint of gohsp.train, got a folder or a device")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER, "null")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise
    except Exception as error:  # a SafetensorError, or what torch says to a dtype that it does not have
        raise ValueError(f"{path}: wanted a checkpoint of gohsp.train, but {cut(error)}") from error
    header = parse_json(text.encode(), str(path), finite=False)  # a run may have lost its way
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}: wanted a checkpoint of gohsp.train in format {FORMAT}")
    digest = header.pop(_SHA256, None)  # earlier versions wrote none
    check_keys(header, tuple(_KINDS), str(path))
    for name, kind in _KINDS.items():
        if type(header[name]) is not kind:
            raise ValueError(f"{path}: {name}: wanted a {kind.__name__}, got {shown(header[name])}")
    if header["step"] < 0:
        raise ValueError(f"{path}: step: wanted 0 or more, got {header['step']}")
    if digest not in (None, _digest(header, tensors)):
        raise ValueError(f"{path}: it is damaged: it does not hold what was written")
    return Checkpoint(header["stage"], header["step"], header["done"], tensors, header["values"])


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return digest_tensors(tensors, beside=json.dumps(header, sort_keys=True))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of an optimiser into tensors and plain values, by ``state.parameter.name``.

    What its groups of parameters hold is there as ``group.number.name``: some optimisers count their steps there.

    Raises:
        ValueError: The state holds something that is neither a tensor nor a plain value.
    """
    whole = optimizer.state_dict()
    named = {f"group.{i}.{name}": v for i, group in enumerate(whole["param_groups"]) for name, v in group.items()}
    # Settings that are no single numbers, such as betas, are those that the optimiser is made with again.
    named = {key: value for key, value in named.items() if isinstance(value, Tensor) or _is_plain(value)}
    named |= {f"state.{p}.{name}": value for p, entries in whole["state"].items() for name, value in entries.items()}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in named.items() if key not in tensors}
    if other := sorted(f"{key} ({type(value).__name__})" for key, value in values.items() if not _is_plain(value)):
        raise ValueError(
            f"optimizer: wanted one whose state is tensors and numbers, to save it; {type(optimizer).__name__} keeps "
            + ", ".join(other)
        )
    return tensors, values


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give a fresh optimiser, made with the same settings, the state that :func:`pack_optimizer` took apart.

    Raises:
        ValueError: The state is not one of such an optimiser.
    """
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    try:
        for key, value in {**tensors, **values}.items():
            part, number, name = key.split(".", 2)
            (groups[int(number)] if part == "group" else state.setdefault(int(number), {}))[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"optimizer: wanted the state of a {type(optimizer).__name__}, but {cut(error)}") from error


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
