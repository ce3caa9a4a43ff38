# SPDX-License-Identifier: Apache-2.0
"""Which families of models there are, and the one way to open a model."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from gohsp.models.base import (
    BlockFamily,
    CompactBlock,
    CompressedModel,
    Family,
    Geometry,
    OpenBlock,
    OpenModel,
    wrong_kind,
)

FAMILIES: list[Family] = []
"""In the order in which they are asked."""

BLOCKS: list[BlockFamily] = []
"""Of blocks in models that are not taken as a whole, asked after those."""


class Outside(NamedTuple):
    """A family whose adapter is imported only where a model of its library is met.

    Attributes:
        family: Name of the class of the adapter.
        adapter: Module that registers it.
        wanted: Its :attr:`Family.wanted`.
    """

    family: str
    adapter: str
    wanted: str


OUTSIDE: dict[str, Outside] = {
    "transformers": Outside(
        "HfVit",
        "gohsp.models.hf_vit",
        "a transformers ViT, DeiT, ViTMSN, IJepa, Dinov2, Dinov2WithRegisters, DINOv3ViT, CLIPVision or SiglipVision "
        "model",
    ),
    "torchvision": Outside("TorchvisionVit", "gohsp.models.torchvision_vit", "a torchvision VisionTransformer"),
}
"""By the package that the model's class comes from."""

DEEPEST = 64
"""Modules within each other: to copy a model takes Python several calls for each."""


def register(family: Family) -> None:
    """Add a family of models. It is asked before those that are there."""
    FAMILIES.insert(0, family)


def register_blocks(family: BlockFamily) -> None:
    """Add a family of blocks in models that are not taken as a whole."""
    BLOCKS.insert(0, family)


def family_of(model: nn.Module) -> Family:
    """Return the family of a dense, compressed or frozen model.

    Raises:
        TypeError: No family claims it; the message names what they want, and the part of the model that is such a one.
        ValueError: Its modules are nested too deeply to be copied.
    """
    _check_nesting(model)
    if family := _claiming(model):
        return family
    outside = [other.wanted for other in OUTSIDE.values()]
    wanted = [family.wanted for family in FAMILIES if family.wanted not in outside] + outside
    raise wrong_kind(" or ".join(wanted), model, _way_out(model))


def family_named(name: object) -> Family:
    """Return the family whose adapter is a class of that name.

    Raises:
        KeyError: There is none; its argument lists the names that there are.
        ImportError: Its library is not installed.
    """
    for package, outside in OUTSIDE.items():
        if name == outside.family:
            try:
                import_module(outside.adapter)
            except ImportError as error:
                raise ImportError(
                    f"plan.model.family: {name} wants {package}: pip install 'gohsp[{package}]'"
                ) from error
    families = {type(family).__name__: family for family in FAMILIES}
    if not isinstance(name, str) or name not in families:
        raise KeyError(sorted({*families, *(outside.family for outside in OUTSIDE.values())}))
    return families[name]


def _claiming(model: nn.Module) -> Family | None:
    _import_adapter(model)
    return next((family for family in FAMILIES if family.claims(model)), None)


def _import_adapter(module: nn.Module) -> None:
    for kind in type(module).__mro__:
        if outside := OUTSIDE.get(kind.__module__.partition(".")[0]):
            import_module(outside.adapter)


def known_block(block: nn.Module) -> tuple[BlockFamily, OpenBlock]:
    """Open a single dense block, in a model of whatever class.

    Raises:
        TypeError: No family knows such blocks.
        ValueError: It holds something that gohsp cannot prune exactly; the message gives the reason.
    """
    found = open_block(block)
    if found is None:
        kind = type(block)
        raise TypeError(
            "block: wanted timm's Block, torchvision's EncoderBlock, a layer of an image encoder of transformers, or a "
            f"block of another model that docs/models.md says so of; got {kind.__module__}.{kind.__name__}"
        )
    return found


def open_block(block: nn.Module) -> tuple[BlockFamily, OpenBlock] | None:
    """Return what :func:`known_block` does, or None where no family knows such blocks.

    Raises:
        ValueError: It holds something that gohsp cannot prune exactly; the message gives the reason.
    """
    _import_adapter(block)
    for family in (*FAMILIES, *BLOCKS):
        if (opened := family.open_block(block)) is not None:
            return family, opened
    return None


def _way_out(model: nn.Module) -> str:
    """Return which part of a model could be given in its place: what a wrapper wraps, or one tower of two."""
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, part in named:
        if name and _claiming(part):
            return f". Its {name} is a {type(part).__name__}: give model.{name}, and put the result back in its place"
    return ""


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
