# SPDX-License-Identifier: Apache-2.0
"""Models of timm's that a plan describes by timm's name of the architecture and the arguments beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import timm
import torch
from torch import nn

from gohsp.files import check_keys, cut, shown
from gohsp.layers import FrozenBlock, FrozenLinear, has_additions
from gohsp.models.base import MAX_DEPTH, Geometry
from gohsp.models.timm_vit import TimmVit

COMMON_ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("qkv_bias", "mlp_ratio", "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "init_values"),
)
"""What a description may give to the models of every family here."""

_MOST, _MOST_PATCHES = 2**24, 2**20


class OfOneSize:
    """Marks the classes of compressed models that hold what belongs to one size of images: tables, windows."""

    def set_input_size(self, *_: object, **__: object) -> None:
        """Refuse timm's call.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "model: its positions are for one size of images; wanted the dense model, whose set_input_size gives it "
            "another"
        )


class TimmNamed(TimmVit):
    """Adapter for one class of timm's. What is not here is as in a VisionTransformer.

    Attributes:
        dense: The class.
        frozen_block: What packed blocks become.
        fc_norm: Name of the argument that asks for a norm in front of the classifier.
        arguments: All that a description gives to timm; one that names anything else, such as weights to fetch, is
            refused.
    """

    dense: ClassVar[type[nn.Module]]
    frozen_block: ClassVar[type[FrozenBlock]]
    fc_norm: ClassVar[str] = "use_fc_norm"
    arguments: ClassVar[tuple[str, ...]]

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, self.dense)

    def architecture(self, model: nn.Module) -> str:
        name = super().architecture(model)
        return self.dense.__name__ if name == type(model).__name__ else name

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        dim, tokens = model.embed_dim, self.tokens(model, height, width)
        channels = model.patch_embed.proj.in_channels
        parts: list[tuple[nn.Module | None, tuple[int, ...]]] = [
            (model.patch_embed, (1, channels, height, width)),
            (getattr(model, "attn_pool", None), (1, tokens, dim)),
            (model.head, (1, dim)),
        ]
        return [(module, shape) for module, shape in parts if module is not None]

    def freeze(self, model: Any, blocks: Any, embedding: str = "float32") -> nn.Module:
        compact = self.trunk(model).blocks
        result: Any = copy.deepcopy(model, {id(compact): compact})
        for block in blocks:
            block.__class__ = self.frozen_block
        self.trunk(result).blocks = blocks
        head = getattr(model, "head", None)
        if type(head) is nn.Linear and not has_additions(head):
            result.head = FrozenLinear(head)
        return cast(nn.Module, result)

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        own = {"num_classes": model.num_classes, "global_pool": model.global_pool, "in_chans": model.in_chans}
        own |= {"depth": len(model.blocks), "img_size": list(model.patch_embed.img_size)}
        return self.described(model, {**own, self.fc_norm: not isinstance(model.fc_norm, nn.Identity)})

    def described(self, model: Any, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return timm's name of the architecture, and the arguments that it was given beside.

        Args:
            model: Compressed or dense.
            own: Arguments that the live model tells better than those that it was made with.

        Raises:
            ValueError: timm.create_model did not make the model.
        """
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture")
        if not timm.is_model(name or ""):
            kind = self.dense.__name__
            raise ValueError(f"model: wanted one of {kind} made by timm.create_model; plan.json can describe no other")
        return {
            "class": self.dense.__name__,
            "architecture": ".".join(filter(None, (name, config.get("tag")))),
            "arguments": self.plain({**getattr(model, "_model_args", {}), **own}),
        }

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        arguments = self.plain(description["arguments"])
        if not isinstance(depth := arguments.get("depth"), int) or depth != geometry.depth or depth > MAX_DEPTH:
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.depth is {shown(depth)}")

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        name = description["architecture"]
        # What is registered is code of timm's; other names, such as "hf-hub:", would make it fetch or read something.
        if not isinstance(name, str) or not timm.is_model(name):
            raise ValueError(f"plan.model.architecture: this timm ({timm.__version__}) knows no {shown(name)}")
        arguments = self.plain(description["arguments"])
        try:
            with torch.device("meta"):
                dense: Any = timm.create_model(name, **arguments)
        except Exception as error:  # timm asserts, divides and indexes with what it is given
            raise ValueError(f"plan.model.arguments: they do not make a {name}: {cut(error)}") from error
        made: nn.Module = dense
        if type(made) is not self.dense:
            raise ValueError(f"plan.model: wanted a {self.dense.__name__}, but timm made a {type(made).__name__}")
        if self.patches(dense) > _MOST_PATCHES:
            raise ValueError(f"plan.model.arguments.img_size: wanted at most {_MOST_PATCHES} patches")
        return made

    def patches(self, model: Any) -> int:
        """Return how many patches a dense model makes of an image of its own size."""
        return int(self.trunk(model).patch_embed.num_patches)

    def plain(self, arguments: Any) -> dict[str, Any]:
        """Return the arguments of a description, which are numbers, names and short lists of these."""
        if not isinstance(arguments, Mapping):
            raise ValueError(f"plan.model.arguments: wanted a mapping, got {type(arguments).__name__}")
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
        for name, value in found.items():
            if name not in self.arguments:
                raise ValueError(f"plan.model.arguments: wanted no {shown(name)}, which {shown(value)} is given for")
            for part in value if isinstance(value, list) else [value]:
                number = isinstance(part, int | float) and abs(part) <= _MOST
                if not (part is None or isinstance(part, bool | str) or number):
                    raise ValueError(
                        f"plan.model.arguments.{name}: wanted a number up to {_MOST} or a name, got {shown(part)}"
                    )
        return found
