# SPDX-License-Identifier: Apache-2.0
"""Saving and loading compressed models: plan.json (what to build) and model.safetensors (its parameters). No pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gohsp import preprocessing
from gohsp.arguments import check_path
from gohsp.compress import compress
from gohsp.files import (
    MAX_JSON,
    check_keys,
    cut,
    exclusive,
    naming,
    parse_json,
    publish,
    read_bytes,
    refusing,
    rename,
    scratch,
    shown,
    write_json,
)
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_named, family_of

T = TypeVar("T")

FORMAT = 1
PLAN = "plan.json"
WEIGHTS = "model.safetensors"

DEFAULT_FAMILY = "TimmVit"
"""Of plans that name none."""

_PREPROCESSING = "preprocessing"  # in the plan; those of earlier versions have none
_DIGEST = "plan_sha256"  # in the weights
_WEIGHTS_DIGEST = "tensors_sha256"  # in the plan
_MAX_HEADER = 2**27  # bytes; safetensors itself takes headers of 100 MB


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a compressed model into a directory, which is made if it is not there.

    What timm recorded of its images (size, mean, deviation, interpolation, crop) and the names of its classes go with
    it: ``timm.data.resolve_model_data_config`` gives for the loaded model what it gave for this one.

    The plan names the digest of the weights and the weights carry that of the plan, so that a damaged file is noticed
    and files of two different saves are not taken for one model. One rename, that of the plan, makes the new model the
    saved one: until then, and whenever the process is killed, the one that was there before is loaded.

    Args:
        model: A model made by :func:`gohsp.compress`.
        directory: Where plan.json and model.safetensors go; those that are there are replaced. Several threads and
            processes may save into it; they take turns, and the last one stays.

    Raises:
        ValueError: The model is not compressed, or holds something that plan.json cannot describe.
        OSError: The disk is full or may not be written to; the error names the file. The old model or the new one is
            loaded then.
    """
    check_path("directory", directory)
    plan = plan_of(model)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    digest = _digest(plan)
    sha256 = digest_tensors(tensors, digest)
    with exclusive(target), _without_leftovers(target):
        with naming(target / WEIGHTS), scratch(target) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", _DIGEST: digest})
            publish(folder / WEIGHTS, target / _waiting(sha256))
        write_json(target / PLAN, {**plan, _WEIGHTS_DIGEST: sha256})
        # The new model is saved from here on: load looks for the name that waits.
        with naming(target / WEIGHTS):
            rename(target / _waiting(sha256), target / WEIGHTS)


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Return what :func:`save` writes of a compressed model beside its weights.

    Raises:
        ValueError: The model is not compressed, or holds something that this cannot describe.
    """
    mask = ModelMask.of(model)
    plan = {"format": FORMAT, "model": _describe(model, mask), "mask": mask.to_dict()}
    if (described := preprocessing.describe(model)) is not None:
        plan[_PREPROCESSING] = described
    _check_same(model, _build(plan["model"], mask))
    return plan


@contextmanager
def _without_leftovers(target: Path) -> Iterator[None]:
    """Remove weights that wait for a plan that never came, before the block, which may need the room, and after it."""
    _remove_leftovers(target)
    try:
        yield
    finally:
        _remove_leftovers(target)


def _remove_leftovers(target: Path) -> None:
    with suppress(OSError):
        plan = (target / PLAN).read_bytes() if (target / PLAN).exists() else b""
        for left in target.glob(_waiting("*")):
            if left.name.split(".")[2].encode() not in plan:
                left.unlink(missing_ok=True)


def load(directory: str | Path, device: torch.device | str = "cpu", *, verify: bool = True) -> nn.Module:
    """Read a model that :func:`save` wrote, in evaluation mode and in the dtype that it was saved in.

    The weights are mapped and copied: what happens to the file afterwards does not reach the model. Whoever makes the
    file shorter while it is read, other than by :func:`save`, ends the process. Nothing that the files name is run or
    fetched.

    Args:
        directory: Where plan.json and model.safetensors are.
        device: Where the model goes.
        verify: Compare the weights with the SHA-256 that was saved with them, which takes longer than all else of
            loading. False believes the disk; every other check is made.

    Raises:
        FileNotFoundError: One of the two files is not there.
        ValueError: A file is damaged, has another format, or does not belong to the other one.
    """
    check_path("directory", directory)
    source = Path(directory)
    while True:
        before = _stamp(source / PLAN)
        try:
            model = _load(source, verify)
            break
        except (FileNotFoundError, ValueError):
            if _stamp(source / PLAN) == before:  # otherwise another process has saved in between
                raise
    return model.to(device).eval()


def _load(source: Path, verify: bool) -> nn.Module:
    where = source / PLAN
    plan = parse_json(_first(source, (PLAN,), partial(read_bytes, limit=MAX_JSON)), str(where))
    sha256 = plan.get(_WEIGHTS_DIGEST) if isinstance(plan, dict) else None  # plans of earlier versions have none
    wanted = ("format", "model", "mask", *([] if sha256 is None else [_WEIGHTS_DIGEST]))
    check_keys(plan, wanted, str(where), optional=(_PREPROCESSING,))
    if type(plan["format"]) is not int or plan["format"] != FORMAT:
        raise ValueError(f"{where}: wanted format {FORMAT}, got {shown(plan['format'])}")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ValueError(f"{where}: {_WEIGHTS_DIGEST}: wanted 64 hexadecimal digits, got {shown(sha256)}")
    try:
        model = _build(plan["model"], ModelMask.from_dict(plan["mask"]))
        if _PREPROCESSING in plan:
            preprocessing.restore(model, plan[_PREPROCESSING])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    most = 8 * sum(tensor.numel() for tensor in model.state_dict().values()) + _MAX_HEADER
    names = (WEIGHTS,) if sha256 is None else (_waiting(sha256), WEIGHTS)
    tensors, digest = _first(source, names, partial(_read_weights, limit=most))
    if verify and sha256 not in (None, digest_tensors(tensors, digest)):
        raise ValueError(f"{source}: {WEIGHTS} is damaged, or {PLAN} and {WEIGHTS} are not of one save")
    if digest != _digest(plan):
        raise ValueError(f"{source}: {PLAN} and {WEIGHTS} are not of one save, or one of them was changed")
    _check_tensors(model, tensors, source / WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    family_of(model).refresh(model)
    return model


def _first(source: Path, names: tuple[str, ...], read: Callable[[Path], T]) -> T:
    """Return what is in the first of some files that is there."""
    for name in names:
        try:
            return read(source / name)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(f"{source}: wanted a directory that gohsp.save wrote, but it has no {names[-1]}")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from one that took its place, even if that says the same."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _waiting(sha256: str) -> str:
    """Return the name of weights until they take their place."""
    return f".model.{sha256}.safetensors"


def _describe(model: nn.Module, mask: ModelMask) -> dict[str, Any]:
    family = family_of(model)
    described = family.describe(model, mask.geometry)
    name = type(family).__name__
    # Plans of the first family are as they were when it was the only one.
    return described if name == DEFAULT_FAMILY else {"family": name, **described}


def digest_weights(model: nn.Module) -> str:
    """Return the SHA-256 of the parameters and buffers of a model with their names, dtypes and shapes."""
    return digest_tensors(model.state_dict())


def digest_tensors(tensors: Mapping[str, Tensor], beside: str = "") -> str:
    """Return the SHA-256 of a text and of tensors with their names, dtypes and shapes.

    As many threads as torch has read the tensors' bytes: it is what takes longest when a large model is loaded.
    """

    def digest(name: str) -> str:
        tensor = tensors[name].detach().cpu().contiguous()
        raw_bytes = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {raw_bytes}"

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        lines = [beside, *pool.map(digest, sorted(tensors))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _build(description: Any, mask: ModelMask) -> nn.Module:
    """Return the compressed model of a description, its parameters on the meta device."""
    if not isinstance(description, dict):
        raise ValueError(f"plan.model: wanted a mapping, got {type(description).__name__}")
    name = description.get("family", DEFAULT_FAMILY)
    try:
        family = family_named(name)
    except KeyError as error:
        raise ValueError(f"plan.model.family: wanted one of {error.args[0]}, got {shown(name)}") from error
    described = {key: value for key, value in description.items() if key != "family"}
    family.check_description(described, mask.geometry)
    return compress(family.build(described), mask)


def _check_same(model: nn.Module, rebuilt: nn.Module) -> None:
    """Refuse a model that its own description does not give back, module by module and tensor by tensor."""
    for ours, theirs in zip_longest(str(model).splitlines(), str(rebuilt).splitlines(), fillvalue=""):
        if ours != theirs:
            raise ValueError(
                f"model: {PLAN} cannot describe it; it has {ours.strip()!r} where a model made from "
                f"that has {theirs.strip()!r}"
            )
    _check_tensors(rebuilt, model.state_dict(), "model")


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor], where: object) -> None:
    wanted = model.state_dict()
    if wanted.keys() != tensors.keys():
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"{where}: missing tensors {shown(missing)}, unknown tensors {shown(unknown)}")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{where}: {name}: wanted shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{where}: {name}: wanted a dtype like {wanted[name].dtype}, got {tensor.dtype}")


def _read_weights(path: Path, limit: int) -> tuple[dict[str, Tensor], str]:
    """Return the tensors, which own their memory, and the digest of the plan that they belong to."""
    with refusing(path, limit):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
                metadata = file.metadata() or {}
        except OSError:
            raise
        except Exception as error:  # a SafetensorError, or what torch says to a dtype that it does not have
            raise ValueError(f"{path}: wanted a safetensors file, but {cut(error)}") from error
    return tensors, metadata.get(_DIGEST, "")


def _digest(plan: dict[str, Any]) -> str:
    """Return the digest of a plan without what it says of the weights, which carry this digest."""
    told = {key: value for key, value in plan.items() if key != _WEIGHTS_DIGEST}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
