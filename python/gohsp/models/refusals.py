# SPDX-License-Identifier: Apache-2.0
"""Why a block of a model cannot be pruned exactly, as far as that is the same for every family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.layers import LayerNorm
from torch import nn

# Attribute that a tool leaves on a module whose weight it computes -> what undoes it.
_COMPUTED = {
    "parametrizations": "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    "weight_orig": "torch.nn.utils.prune.remove(module, 'weight') or torch.nn.utils.remove_spectral_norm(module)",
    "weight_g": "torch.nn.utils.remove_weight_norm(module)",
}


def why_computed(block: Any) -> str | None:
    """Return which weight of a block is computed from other tensors and how to end that, or None if none is."""
    for name, module in block.named_modules():
        for attribute, way_out in _COMPUTED.items():
            if hasattr(module, attribute):
                return f"the weight of {name} is computed ({attribute}); call {way_out} first"
    return None


def why_altered(block: Any) -> str | None:
    """Return what stands between the modules of a block and their bare weights, or None if nothing does."""
    if computed := why_computed(block):
        return computed
    for name, module in block.named_modules():
        if "forward" in vars(module):
            return f"forward of {name or 'the block'} was replaced on the object, and would be lost; undo that first"
    return None


def why_linear(name: str, layer: Any) -> str | None:
    """Return why a layer is not the linear map that its weight and bias say, or None if it is."""
    if type(layer) is nn.Linear:
        return None
    kind = type(layer)
    return (
        f"{name} is {kind.__module__}.{kind.__qualname__}; wanted torch.nn.Linear. "
        "Adapters are merged first (peft: merge_and_unload())"
    )


def why_norm(name: str, norm: Any) -> str | None:
    """Return why a norm is not the LayerNorm of the kernels, or None if it is."""
    # Subclasses that compute in another dtype or another way would not be what the fused kernels compute.
    if type(norm) not in (nn.LayerNorm, LayerNorm):
        return f"{name} is {type(norm).__name__}; wanted LayerNorm"
    return None


def refuse_computed(blocks: Iterable[Any], place: str = "blocks.{}") -> None:
    """Refuse to make compact blocks plain where a weight is computed from other tensors.

    Raises:
        ValueError: There is such a weight; the message names the block and the reason.
    """
    for index, block in enumerate(blocks):
        if reason := why_computed(block):
            raise ValueError(f"model: cannot make {place.format(index)} plain: {reason}")
