# SPDX-License-Identifier: Apache-2.0
"""Saving and loading compressed models: plan.json (what to build) and model.safetensors (its parameters). No pickle."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import LayerNorm
from torch import Tensor, nn

from gohsp import vit
from gohsp.compress import compress
from gohsp.files import read_json, replacing, write_json
from gohsp.mask import ModelMask, check_keys

FORMAT = 1
PLAN = "plan.json"
WEIGHTS = "model.safetensors"

_CLASSES = {cls.__name__: cls for cls in vit.COMPRESSED_CLASS}
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


def digest_weights(model: nn.Module) -> str:
    """Return what tells the parameters and buffers of a model from others, names included: SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe(model: Any, mask: ModelMask) -> dict[str, Any]:
    """Return the class of the dense model and the arguments that make it, read from the live model."""
    size = mask.geometry
    first, last = model.blocks[0], model.blocks[-1]
    embed = model.patch_embed
    arguments = {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": size.dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        # timm rounds dim * ratio down; half a neuron more makes that exact.
        "mlp_ratio": (size.hidden + 0.5) / size.dim,
        "qkv_bias": first.attn.qkv.bias is not None,
        "qk_norm": size.qk_norm,
        "proj_bias": first.attn.proj.bias is not None,
        # 0 rather than None, which create_model would take for "not given". The values come from the weights.
        "init_values": 0.0 if isinstance(first.ls1, nn.Identity) else 1.0,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "proj_drop_rate": first.attn.proj_drop.p,
        "attn_drop_rate": first.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
        "norm_eps": first.norm1.eps,
        "activation": first.mlp.activation,
    }
    class_name = vit.DENSE_CLASS[type(model)].__name__
    return {"class": class_name, "architecture": _registered_name(model), "arguments": arguments}


def _registered_name(model: nn.Module) -> str | None:
    """Return the name, with its tag, under which timm can make this architecture, or None if it cannot."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not timm.is_model(config.get("architecture") or ""):
        return None
    return ".".join(filter(None, (config["architecture"], config.get("tag"))))


def _build(description: Any, mask: ModelMask) -> nn.Module:
    """Return the compressed model of a description, its parameters on the meta device."""
    check_keys(description, ("class", "architecture", "arguments"), "plan.model")
    name, arguments = description["architecture"], dict(description["arguments"])
    wanted = _CLASSES.get(description["class"])
    if wanted is None:
        raise ValueError(f"plan.model.class: wanted one of {sorted(_CLASSES)}, got {description['class']!r}")
    # is_model also keeps create_model from names that would make it fetch something.
    if name is not None and not timm.is_model(name):
        raise ValueError(f"plan.model.architecture: this timm ({timm.__version__}) knows no {name!r}")
    create = wanted if name is None else partial(timm.create_model, name)
    try:
        arguments["norm_layer"] = partial(LayerNorm, eps=arguments.pop("norm_eps"))
        arguments["act_layer"] = vit.ACTIVATIONS[arguments.pop("activation")]
        with torch.device("meta"):
            dense = create(**arguments, weight_init="skip")
    except (KeyError, TypeError) as error:
        raise ValueError(f"plan.model.arguments: they do not make a {wanted.__name__}: {error!r}") from error
    if type(dense) is not wanted:
        raise ValueError(f"plan.model: wanted a {wanted.__name__}, but timm made a {type(dense).__name__}")
    return compress(dense, mask)


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
