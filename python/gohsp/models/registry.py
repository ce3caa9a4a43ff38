# SPDX-License-Identifier: Apache-2.0
"""Which families of models there are, and the one way to open a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from gohsp.models.base import CompactBlock, CompressedModel, Family, Geometry, OpenModel, wrong_kind

FAMILIES: list[Family] = []
"""In the order in which they are asked."""

DEEPEST = 64
"""Modules within each other: to copy a model takes Python several calls for each."""


def register(family: Family) -> None:
    """Add a family of models. It is asked before those that are there."""
    FAMILIES.insert(0, family)


def family_of(model: nn.Module) -> Family:
    """Return the family of a dense, compressed or frozen model.

    Raises:
        TypeError: No family claims it; the message names what they want.
        ValueError: Its modules are nested too deeply to be copied.
    """
    _check_nesting(model)
    for family in FAMILIES:
        if family.claims(model):
            return family
    raise wrong_kind(" or ".join(family.wanted for family in FAMILIES), model)


def _check_nesting(model: nn.Module) -> None:
    level = {model} if isinstance(model, nn.Module) else set()
    for _ in range(DEEPEST + 1):
        level = {child for module in level for child in module.children()}
        if not level:
            return
    raise ValueError(f"model: wanted at most {DEEPEST} modules within each other, got more")


def open_model(model: nn.Module) -> OpenModel:
    """Open a dense model that gohsp can prune.

    Raises:
        TypeError: It is of no family that gohsp knows.
        ValueError: It is already compressed or nested too deeply, or a block holds something that gohsp cannot prune
            exactly; the message names the block and the reason.
    """
    if is_compressed(model):
        raise ValueError("model: it is already compressed; wanted the dense model that the mask is made for")
    family = family_of(model)
    return OpenModel(model, family, family.open_blocks(model))


def is_compressed(model: nn.Module) -> bool:
    """Return whether the model was made by :func:`gohsp.compress`."""
    return isinstance(model, CompressedModel)


def find_compact_blocks(model: nn.Module) -> list[Any]:
    """Return the blocks of a compressed model, in the order of the data.

    Raises:
        ValueError: The model is not compressed, or frozen.
    """
    if not is_compressed(model):
        raise ValueError(f"model: wanted a model made by gohsp.compress, got {type(model).__name__}")
    blocks = [module for module in model.modules() if isinstance(module, CompactBlock)]
    if not blocks:
        raise ValueError("model: it is frozen, so its compact weights are gone; wanted the model it was made from")
    return blocks


def geometry_of(model: nn.Module) -> Geometry:
    """Return the sizes of a dense model, or those that a compressed model had before.

    Raises:
        TypeError, ValueError: See :func:`open_model`; or the model is frozen.
    """
    if not is_compressed(model):
        return open_model(model).geometry
    return Geometry(tuple(block.geometry for block in find_compact_blocks(model)))
