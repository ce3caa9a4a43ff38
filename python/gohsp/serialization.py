# SPDX-License-Identifier: Apache-2.0
"""Saving and loading compressed models: plan.json (what to build) and model.safetensors (its parameters). No pickle."""

from __future__ import annotations

import hashlib
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gohsp.compress import compress
from gohsp.files import check_keys, read_json, replacing, shown, write_json
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import FAMILIES, family_of

FORMAT = 1
PLAN = "plan.json"
WEIGHTS = "model.safetensors"

DEFAULT_FAMILY = "TimmVit"
"""Of plans that name none."""

_DIGEST = "plan_sha256"


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a compressed model into a directory, which is made if it is not there.

    The weights carry the digest of the plan, so that files of two different saves are not taken for one model.

    Args:
        model: A model made by :func:`gohsp.compress`.
        directory: Where plan.json and model.safetensors go; those that are there are replaced, each in one step.

    Raises:
        ValueError: The model is not compressed, or holds something that plan.json cannot describe.
    """
    mask = ModelMask.of(model)
    plan = {"format": FORMAT, "model": _describe(model, mask), "mask": mask.to_dict()}
    _check_same(model, _build(plan["model"], mask))
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(target / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _DIGEST: _digest(plan)})
    write_json(target / PLAN, plan)


def load(directory: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Read a model that :func:`save` wrote, in evaluation mode and in the dtype that it was saved in.

    Args:
        directory: Where plan.json and model.safetensors are.
        device: Where the model goes.

    Raises:
        FileNotFoundError: One of the two files is not there.
        ValueError: A file is damaged, has another format, or does not belong to the other one.
    """
    source = Path(directory)
    for name in (PLAN, WEIGHTS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source}: wanted a directory that gohsp.save wrote, but it has no {name}")
    plan = read_json(source / PLAN)
    check_keys(plan, ("format", "model", "mask"), str(source / PLAN))
    if plan["format"] != FORMAT:
        raise ValueError(f"{source / PLAN}: wanted format {FORMAT}, got {plan['format']!r}")
    tensors, digest = _read_weights(source / WEIGHTS)
    if digest != _digest(plan):
        raise ValueError(f"{source}: {PLAN} and {WEIGHTS} are not of one save, or one of them was changed")
    model = _build(plan["model"], ModelMask.from_dict(plan["mask"]))
    _check_tensors(model, tensors, source / WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


def _describe(model: nn.Module, mask: ModelMask) -> dict[str, Any]:
    family = family_of(model)
    described = family.describe(model, mask.geometry)
    name = type(family).__name__
    # Plans of the first family are as they were when it was the only one.
    return described if name == DEFAULT_FAMILY else {"family": name, **described}


def digest_weights(model: nn.Module) -> str:
    """Return what tells the parameters and buffers of a model from others, names included: SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _build(description: Any, mask: ModelMask) -> nn.Module:
    """Return the compressed model of a description, its parameters on the meta device."""
    if not isinstance(description, dict):
        raise ValueError(f"plan.model: wanted a mapping, got {type(description).__name__}")
    name = description.get("family", DEFAULT_FAMILY)
    families = {type(family).__name__: family for family in FAMILIES}
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"plan.model.family: wanted one of {sorted(families)}, got {shown(name)}")
    described = {key: value for key, value in description.items() if key != "family"}
    families[name].check_description(described, mask.geometry)
    return compress(families[name].build(described), mask)


def _check_same(model: nn.Module, rebuilt: nn.Module) -> None:
    """Refuse a model that its own description does not give back, module by module and tensor by tensor."""
    for ours, theirs in zip_longest(str(model).splitlines(), str(rebuilt).splitlines(), fillvalue=""):
        if ours != theirs:
            raise ValueError(
                f"model: {PLAN} cannot describe it; it has {ours.strip()!r} where a timm model made with the same "
                f"arguments has {theirs.strip()!r}"
            )
    _check_tensors(rebuilt, model.state_dict(), "model")


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor], where: object) -> None:
    wanted = model.state_dict()
    if wanted.keys() != tensors.keys():
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"{where}: missing tensors {missing}, unknown tensors {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{where}: {name}: wanted shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}")


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the digest of the plan that they belong to."""
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            return {name: file.get_tensor(name) for name in names}, metadata.get(_DIGEST, "")
    except SafetensorError as error:
        raise ValueError(f"{path}: wanted a safetensors file, but {error}") from error


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
