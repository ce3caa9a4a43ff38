# SPDX-License-Identifier: Apache-2.0
"""What families of timm's have in common whose blocks stand in stages, with something between these."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from gohsp.files import check_keys, shown
from gohsp.layers import FrozenLinear, has_additions
from gohsp.models.base import MAX_DEPTH, CompactBlock, Geometry, OpenBlock, wrong_kind
from gohsp.models.refusals import refuse_computed
from gohsp.models.timm_named import TimmNamed


class Place(NamedTuple):
    """Where a block is.

    Attributes:
        holder: Module that it is a child of.
        name: Its name there.
    """

    holder: nn.Module
    name: str

    @property
    def block(self) -> Any:
        """What is there."""
        return getattr(self.holder, self.name)


def places_in(blocks: nn.Module) -> list[Place]:
    """Return the places of all children of a module, in their order."""
    return [Place(blocks, name) for name, _ in blocks.named_children()]


class TimmStages(TimmNamed):
    """Adapter for one class of timm's that has stages: blocks one after another, and something in front of them.

    Attributes:
        compressed: What a compressed model of the class is.
        block: Class of the blocks.
    """

    compressed: ClassVar[type[nn.Module]]
    block: ClassVar[type[nn.Module]]

    @abstractmethod
    def stages(self, model: Any) -> list[list[Place]]:
        """Return where the blocks of each stage are, in the order of the data."""

    @abstractmethod
    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        """Return what the model has in front of a stage; see :class:`gohsp.models.base.Attention`."""

    @abstractmethod
    def why_unsupported(self, block: Any) -> str | None:
        """Return why a block cannot be pruned exactly, or None if it can."""

    def why_not_there(self, block: Any, model: Any, stage: int) -> str | None:
        """Return why a block cannot be pruned where it is in a model, or None if it can."""
        return None

    @abstractmethod
    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        """Return a block that there is nothing against, opened.

        Args:
            block: The block.
            model: What it is of, or None for a block alone.
            stage: Its number in the model.
        """

    @abstractmethod
    def plain_block(self, block: Any) -> nn.Module:
        """Return a compact block as the library's own, in plain PyTorch."""

    @abstractmethod
    def freeze_block(self, frozen: Any, block: Any) -> None:
        """Let a packed block be called as the compact one is that it was made of."""

    def classifier(self, model: Any) -> tuple[Any, str]:
        """Return the module that holds the classifier, and its name there."""
        return model, "head"

    def blocks(self, model: Any) -> list[Any]:
        """Return the blocks of a model, in the order of the data."""
        return [place.block for stage in self.stages(model) for place in stage]

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is not self.dense:
            raise wrong_kind(self.wanted, model)
        found = []
        for number, stage in enumerate(self.stages(model)):
            for index, block in enumerate(place.block for place in stage):
                if reason := self._why_not(block) or self.why_not_there(block, model, number):
                    raise ValueError(f"model: cannot prune {name_of(model, block)}: {reason}")
                opened = self.opened(block, model, number)
                if index == 0:
                    entered = replace(opened.attention, transition=self.between(model, number))
                    opened = replace(opened, attention=entered)
                found.append(opened)
        if not found:
            raise ValueError("model: it has no transformer blocks")
        return tuple(found)

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        if type(block) is not self.block:
            return None
        if reason := self.why_unsupported(block):
            raise ValueError(f"block: cannot prune it: {reason}")
        return self.opened(block, None, 0)

    def _why_not(self, block: nn.Module) -> str | None:
        if type(block) is not self.block:
            return f"wanted timm's {self.block.__name__}, got {type(block).__name__}"
        return self.why_unsupported(block)

    def stream_places(self, model: Any) -> list[nn.Module]:
        return [*self.blocks(model), model.norm]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        dense = self.blocks(model)
        self._replace(result, [self.dress(compact, block) for compact, block in zip(blocks, dense, strict=True)])
        result.__class__ = self.compressed
        return cast(nn.Module, result)

    def disassemble(self, model: Any) -> nn.Module:
        refuse_computed(self.blocks(model), "block {}")
        result: Any = copy.deepcopy(model)
        self._replace(result, [self.plain_block(block) for block in self.blocks(result)])
        result.__class__ = self.dense
        return cast(nn.Module, result)

    def freeze(self, model: Any, blocks: Any, embedding: str = "float32") -> nn.Module:
        compact = self.blocks(model)
        result: Any = copy.deepcopy(model, {id(block): block for block in compact})
        for frozen, block in zip(blocks, compact, strict=True):
            self.freeze_block(frozen, block)
        self._replace(result, list(blocks))
        owner, name = self.classifier(result)
        if type(layer := getattr(owner, name)) is nn.Linear and not has_additions(layer):
            setattr(owner, name, FrozenLinear(layer))
        return cast(nn.Module, result)

    def _replace(self, model: Any, blocks: Sequence[nn.Module]) -> None:
        """Put blocks in the place of a model's own."""
        places = [place for stage in self.stages(model) for place in stage]
        for place, block in zip(places, blocks, strict=True):
            setattr(place.holder, place.name, block)


def name_of(model: nn.Module, block: nn.Module) -> str:
    """Return the name of a block in its model."""
    return next(name for name, module in model.named_modules() if module is block)


class TimmRuns(TimmStages):
    """Adapter for one class of timm's that has one list of blocks, some of which stay as they are.

    A stage is a run of blocks that may be pruned, one after another; what stays is in front of the next one.
    """

    @abstractmethod
    def why_it_stays(self, block: Any) -> str | None:
        """Return why a block of a model, dense or compressed, stays as it is, or None if it may be pruned."""

    def stays(self, block: Any) -> bool:
        """Return whether a block of a model, dense or compressed, is one that stays as it is."""
        return self.why_it_stays(block) is not None

    def left_alone(self, model: Any) -> list[tuple[str, str]]:
        reasons = ((name_of(model, block), self.why_it_stays(block)) for block in model.blocks)
        return [(name, reason) for name, reason in reasons if reason is not None]

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        stages = self.plain(description["arguments"]).get("stages")
        listed = stages if isinstance(stages, list) else []
        whole = all(type(depth) is int and 0 < depth <= MAX_DEPTH for depth in listed)
        if not whole or not sum(listed) - len(listed) < geometry.depth <= sum(listed):  # some stay
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.stages is {shown(stages)}")

    def stages(self, model: Any) -> list[list[Place]]:
        return [run for _, run in self._runs(model) if run]

    def in_front(self, model: Any, stage: int) -> list[Any]:
        """Return the blocks that stay between a run and the one before it."""
        return self._runs(model)[stage][0]

    def behind(self, model: Any) -> list[Any]:
        """Return the blocks that stay behind the last run."""
        staying, run = self._runs(model)[-1]
        return [] if run else staying

    def _runs(self, model: Any) -> list[tuple[list[Any], list[Place]]]:
        """Return (what stays in front of it, the run) of each run; the last one may be empty."""
        runs: list[tuple[list[Any], list[Place]]] = [([], [])]
        for place in places_in(model.blocks):
            if not self.stays(place.block):
                runs[-1][1].append(place)
                continue
            if runs[-1][1]:
                runs.append(([], []))
            runs[-1][0].append(place.block)
        return runs
