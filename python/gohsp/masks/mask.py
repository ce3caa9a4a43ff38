# SPDX-License-Identifier: Apache-2.0
"""Masks: which groups of a vision transformer are kept.

The meaning of a mask is the masked dense model: the original module with the pruned entries of its weights and biases
set to zero, and LayerNorm still over all features. :meth:`ModelMask.apply_` makes exactly that.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.arguments import check_kind, check_number, check_path, check_whole
from gohsp.count import BlockSize, count_opened
from gohsp.files import check_keys, read_json, shown, write_json
from gohsp.masks.layout import BlockLayout
from gohsp.masks.ranges import from_ranges, to_ranges
from gohsp.masks.summary import table
from gohsp.models.base import MAX_DEPTH, MAX_SIZE, BlockGeometry, Geometry, OpenBlock, OpenModel
from gohsp.models.registry import family_of, find_compact_blocks, geometry_of, known_block, open_model

FORMATS = (1, 2)
"""Of mask files. Format 1 has one geometry for all blocks and is written where they are alike; format 2 one a block."""

_MAX_ENTRIES = 2**27
"""Of the masks of a file, a byte each: a few letters ("all") may ask for any number of them."""


@dataclass(eq=False)
class BlockMask:
    """Which groups of one block are kept: boolean CPU tensors, True = kept, freely set by the user.

    H heads of d channels, M hidden neurons, D residual features. A pruned head takes its q, k and v channels with it,
    whatever ``qk`` and ``v`` say.

    Attributes:
        heads: [H]
        qk: [H, d], one entry for a q row and the k row that it meets.
        v: [H, d], one entry for a v row and its column of proj.
        hidden: [M], one entry for a row of fc1, its bias and its column of fc2.
        attn_in: [D], columns of qkv.
        attn_out: [D], rows of proj.
        mlp_in: [D], columns of fc1.
        mlp_out: [D], rows of fc2.
    """

    heads: Tensor
    qk: Tensor
    v: Tensor
    hidden: Tensor
    attn_in: Tensor
    attn_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor

    @classmethod
    def full(cls, dim: int, num_heads: int, head_dim: int, hidden: int) -> BlockMask:
        """Return the mask that keeps everything."""
        shapes = _shapes(BlockGeometry(dim, num_heads, head_dim, hidden))
        return cls(**{name: torch.ones(shape, dtype=torch.bool, device="cpu") for name, shape in shapes.items()})

    @classmethod
    def of_block(cls, block: nn.Module) -> BlockMask:
        """Return the mask that keeps everything of a dense block; see :func:`gohsp.compress_block`.

        Raises:
            TypeError, ValueError: gohsp does not know such blocks, or cannot prune this one exactly.
        """
        return cls.full_of(known_block(block)[1])

    @classmethod
    def full_of(cls, block: OpenBlock) -> BlockMask:
        """Return the mask that keeps everything of a dense block that is opened already."""
        size = block.geometry
        return cls.full(size.dim, size.num_heads, size.head_dim, size.hidden)

    def check_fits(self, size: BlockGeometry) -> None:
        """Check every rule that a mask has to keep, and that it is made for a block of given sizes.

        Raises:
            ValueError: It is not, or a rule is broken.
        """
        _validate_block(self, size, "mask")

    def clone(self) -> BlockMask:
        """Return a copy that shares no memory with this mask."""
        return BlockMask(**{name: getattr(self, name).clone() for name in FIELDS})

    def apply_(self, block: OpenBlock) -> None:
        """Set the pruned entries of a dense block's weights and biases to zero, in place."""
        qk = (self.qk & self.heads[:, None]).flatten()
        v = (self.v & self.heads[:, None]).flatten()
        block.attention.read.clear_(~torch.cat((qk, qk, v)), ~self.attn_in)
        block.attention.write.clear_(~self.attn_out, ~v)
        block.mlp.read.clear_(block.mlp.rows(~self.hidden), ~self.mlp_in)
        block.mlp.write.clear_(~self.mlp_out, ~self.hidden)

    def size(self) -> BlockSize:
        """Return the widths that the cost of what is kept depends on."""
        layout = self.layout()
        kept = (int(columns.sum()) for columns in (self.attn_in, self.attn_out, self.mlp_in, self.mlp_out))
        return BlockSize(len(layout.heads), sum(layout.qk_widths), sum(layout.v_widths), layout.hidden.numel(), *kept)

    def layout(self) -> BlockLayout:
        """Return the ragged layout of what this mask keeps."""
        num_heads, head_dim = self.v.shape
        # Exact: softmax(QK) V is nothing without V, so such a head leaves with its q and k rows.
        alive = self.heads & self.v.any(dim=1)
        heads = _indices(alive)
        qk = self.qk & alive[:, None]
        v = self.v & alive[:, None]
        q_rows, v_cols = _indices(qk.flatten()), _indices(v.flatten())
        span = num_heads * head_dim
        return BlockLayout(
            heads=tuple(heads.tolist()),
            qk_widths=tuple(qk.sum(dim=1)[heads].tolist()),
            v_widths=tuple(v.sum(dim=1)[heads].tolist()),
            q_rows=q_rows,
            k_rows=q_rows + span,
            v_rows=v_cols + 2 * span,
            proj_cols=v_cols,
            hidden=_indices(self.hidden),
            attn_in=_columns(self.attn_in),
            attn_out=_columns(self.attn_out),
            mlp_in=_columns(self.mlp_in),
            mlp_out=_columns(self.mlp_out),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in FIELDS)

    __hash__ = None  # type: ignore[assignment]  # mutable


FIELDS: tuple[str, ...] = tuple(field.name for field in fields(BlockMask))


@dataclass
class ModelMask:
    """Which groups of a model are kept: one :class:`BlockMask` a block, and the sizes of the dense model.

    Attributes:
        blocks: The masks, in the order of the model's blocks.
        model: timm's name of the architecture, or the name of the class.
        geometry: Sizes of the dense model.
        turned: Which channels, "qk" and "v", are meant in the principal axes of their heads, as :func:`gohsp.prune`
            turns them, and not as training left them: the mask is then one of the turned model.
    """

    blocks: list[BlockMask]
    model: str
    geometry: Geometry
    turned: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def full(cls, model: nn.Module) -> ModelMask:
        """Return the mask that keeps everything of a dense model.

        Raises:
            TypeError, ValueError: The model is not one that gohsp can prune.
        """
        return cls.full_of(open_model(model))

    @classmethod
    def full_of(cls, opened: OpenModel) -> ModelMask:
        """Return the mask that keeps everything of a dense model that is opened already."""
        blocks = [BlockMask.full_of(block) for block in opened.blocks]
        return cls(blocks, opened.family.architecture(opened.model), opened.geometry)

    @classmethod
    def of(cls, model: nn.Module) -> ModelMask:
        """Return a copy of the mask that a compressed model was made with.

        Raises:
            ValueError: The model is not compressed.
        """
        compact = find_compact_blocks(model)
        geometry = Geometry(tuple(block.geometry for block in compact))
        blocks = [block.mask.clone() for block in compact]
        return cls(blocks, family_of(model).architecture(model), geometry)

    @classmethod
    def keep_first(cls, model: nn.Module, heads: int | None = None, hidden: int | None = None) -> ModelMask:
        """Return the mask that keeps the first heads and the first neurons of every block.

        Args:
            model: The dense model.
            heads: Heads to keep in each block; None keeps all.
            hidden: Neurons to keep in each block; None keeps all.

        Raises:
            ValueError: More is asked for than the model has, or fewer than none.
        """
        mask = cls.full(model)
        for name, wanted in (("heads", heads), ("hidden", hidden)):
            available = min(getattr(block, name).numel() for block in mask.blocks)
            if wanted is None:
                continue
            check_whole(name, wanted, 0, available)
            for block in mask.blocks:
                getattr(block, name)[wanted:] = False
        return mask

    @classmethod
    def random(
        cls, model: nn.Module, keep: float | Mapping[str, float] = 0.6, generator: torch.Generator | None = None
    ) -> ModelMask:
        """Return a random heterogeneous mask: every entry of every field is drawn on its own.

        Each block keeps at least one head, one V channel a head, one neuron and one column of each matrix, except in
        fields whose share is 0. QK channels have no such floor. A model with qk-norm keeps all of them.

        Args:
            model: The dense model.
            keep: Share to keep, from 0 to 1: one for all fields, or by field (fields not named are kept whole).
            generator: Source of the draws; None takes torch's default one.

        Raises:
            ValueError: A share is outside [0, 1], a field is unknown, or QK channels are to go from a qk-norm model.
        """
        mask = cls.full(model)
        shares = _shares(keep)
        if generator is not None:
            check_kind("generator", generator, torch.Generator, "a torch.Generator")
        for block, size in zip(mask.blocks, mask.geometry.blocks, strict=True):
            own = shares if isinstance(keep, Mapping) else {**shares, **dict.fromkeys(_whole_fields(size), 1.0)}
            for name, share in own.items():
                draws = torch.rand(getattr(block, name).shape, generator=generator, device="cpu")
                kept = draws < share
                if share > 0 and name != "qk":
                    kept |= draws == draws.amin(dim=-1, keepdim=True)
                setattr(block, name, kept)
        mask.validate()
        return mask

    def validate(self, model: nn.Module | None = None) -> None:
        """Check every rule that a mask has to keep, and that it fits a model if one is given.

        Raises:
            ValueError: A rule is broken; the message names the block and the field.
            TypeError: The model is not one that gohsp can prune.
        """
        if model is not None:
            self.check_fits(geometry_of(model))
        if len(self.blocks) != self.geometry.depth:
            raise ValueError(f"mask.blocks: wanted {self.geometry.depth} blocks, got {len(self.blocks)}")
        for index, (block, size) in enumerate(zip(self.blocks, self.geometry.blocks, strict=True)):
            _validate_block(block, size, f"blocks[{index}]")

    def check_fits(self, geometry: Geometry) -> None:
        """Check every rule that a mask has to keep, and that it is made for a model of given sizes.

        Raises:
            ValueError: It is not, or a rule is broken.
        """
        if geometry != self.geometry:
            raise ValueError(f"mask: it is made for {self.geometry}, but the model is {geometry}")
        self.validate()

    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the pruned entries of a dense model's weights and biases to zero, in place.

        The result is the masked dense model, which defines what the mask means.

        Args:
            model: The dense model that the mask fits.

        Returns:
            The same model.

        Raises:
            ValueError: The mask is not valid, or does not fit the model.
            TypeError: The model is not one that gohsp can prune.
        """
        self.apply_to_(open_model(model))
        return model

    def apply_to_(self, opened: OpenModel) -> None:
        """Do what :meth:`apply_` does to a model that is opened already.

        Raises:
            ValueError: The mask is not valid, or does not fit the model.
        """
        self.check_fits(opened.geometry)
        for block, mask in zip(opened.blocks, self.blocks, strict=True):
            mask.apply_(block)

    def summary(self, model: nn.Module) -> str:
        """Return a table of what each block keeps: heads, widths, neurons, columns, and shares of params and MACs.

        Below it stand the blocks of the model that no mask is for, with the reason.

        Args:
            model: The dense model that the mask fits.

        Raises:
            ValueError: The mask is not valid, or does not fit the model.
            TypeError: The model is not one that gohsp can prune.
        """
        opened = open_model(model)
        self.check_fits(opened.geometry)
        dense, pruned = count_opened(opened), count_opened(opened, mask=self)
        layouts = [block.layout() for block in self.blocks]
        alone = opened.family.left_alone(model)
        return table(f"{self.model}: kept of each block", layouts, self.geometry, pruned, dense, alone)

    def to_dict(self) -> dict[str, Any]:
        """Return the mask as plain JSON values.

        Kept entries are written as ranges: ``"0-3,7"``, ``"all"``, or ``""`` for none; ``qk`` and ``v`` as one such
        string a head.
        """
        return {
            "format": 1 if self.geometry.is_uniform else 2,
            "model": self.model,
            "geometry": _write_geometry(self.geometry),
            "blocks": [{name: to_ranges(getattr(block, name)) for name in FIELDS} for block in self.blocks],
            **({"turned": list(self.turned)} if self.turned else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelMask:
        """Return the mask that :meth:`to_dict` wrote.

        Raises:
            ValueError: A key is missing or unknown, the format is another one, or a value is malformed.
        """
        check_keys(data, ("format", "model", "geometry", "blocks"), "mask", optional=("turned",))
        turned = _read_turned(data.get("turned", []))
        if type(data["format"]) is not int or data["format"] not in FORMATS:
            raise ValueError(f"mask.format: wanted {' or '.join(map(str, FORMATS))}, got {shown(data['format'])}")
        for key, kind in (("model", str), ("blocks", list)):
            if not isinstance(data[key], kind):
                raise ValueError(f"mask.{key}: wanted a {kind.__name__}, got {shown(data[key])}")
        sizes = _read_geometry(data["geometry"], data["format"])
        if len(data["blocks"]) != sizes.depth:
            raise ValueError(f"mask.blocks: wanted {sizes.depth} blocks, got {len(data['blocks'])}")
        blocks = []
        for index, (entry, size) in enumerate(zip(data["blocks"], sizes.blocks, strict=True)):
            where, shapes = f"mask.blocks[{index}]", _shapes(size)
            check_keys(entry, FIELDS, where)
            blocks.append(BlockMask(**{n: from_ranges(entry[n], shapes[n], f"{where}.{n}") for n in FIELDS}))
        mask = cls(blocks, data["model"], sizes, turned)
        mask.validate()
        return mask

    def save(self, path: str | Path) -> None:
        """Write the mask as JSON. The file appears whole or not at all.

        Raises:
            ValueError: The mask is not valid.
        """
        check_path("path", path)
        self.validate()
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> ModelMask:
        """Read a mask that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not JSON, or see :meth:`from_dict`; the message begins with its name.
        """
        check_path("path", path)
        data = read_json(Path(path))
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _read_turned(found: Any) -> tuple[str, ...]:
    if found not in ([], ["qk"], ["v"], ["qk", "v"]):
        raise ValueError(f"mask.turned: wanted a list of qk, v or both, got {shown(found)}")
    return tuple(found)


def _shapes(size: BlockGeometry) -> dict[str, tuple[int, ...]]:
    columns = (size.dim,)
    return {
        "heads": (size.num_heads,),
        "qk": (size.num_heads, size.head_dim),
        "v": (size.num_heads, size.head_dim),
        "hidden": (size.hidden,),
        "attn_in": columns,
        "attn_out": columns,
        "mlp_in": columns,
        "mlp_out": columns,
    }


def _validate_block(block: BlockMask, size: BlockGeometry, where: str) -> None:
    if not isinstance(block, BlockMask):
        raise ValueError(f"{where}: wanted a BlockMask, got {type(block).__name__}")
    for name, shape in _shapes(size).items():
        value = getattr(block, name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}.{name}: wanted a tensor, got {type(value).__name__}")
        if value.dtype != torch.bool:
            raise ValueError(f"{where}.{name}: wanted dtype torch.bool, got {value.dtype}")
        if value.device.type != "cpu":
            raise ValueError(f"{where}.{name}: wanted a CPU tensor, got one on {value.device}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{where}.{name}: wanted shape {shape}, got {tuple(value.shape)}")
    if size.qk_whole and not bool(block.qk[block.heads].all()):
        raise ValueError(
            f"{where}.qk: wanted every QK channel of the kept heads, because {size.qk_whole}; "
            "prune heads, V channels, neurons or columns of this model instead"
        )
    for name in ("attn_out", "mlp_out"):
        if size.writes_whole and not bool(getattr(block, name).all()):
            raise ValueError(f"{where}.{name}: wanted every residual feature, because {size.writes_whole}")


def _whole_fields(size: BlockGeometry) -> tuple[str, ...]:
    """Fields of a block's mask in which nothing may go but what goes with its head."""
    return (*(("qk",) if size.qk_whole else ()), *(("attn_out", "mlp_out") if size.writes_whole else ()))


def _indices(kept: Tensor) -> Tensor:
    return kept.nonzero().flatten()


def _columns(kept: Tensor) -> Tensor | None:
    return None if bool(kept.all()) else _indices(kept)


def _shares(keep: float | Mapping[str, float]) -> dict[str, float]:
    check_kind("keep", keep, (numbers.Real, Mapping), "a share, or a mapping of shares")
    named = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(FIELDS, keep)
    for name, share in named.items():
        if name not in FIELDS:
            raise ValueError(f"keep: unknown field {name!r}; known are {', '.join(FIELDS)}")
        check_number(f"keep[{name!r}]", share, 0, 1)
    return {name: named.get(name, 1.0) for name in FIELDS}


def _write_geometry(geometry: Geometry) -> dict[str, Any] | list[dict[str, Any]]:
    sizes = [_write_sizes(block) for block in geometry.blocks]
    return {"depth": geometry.depth, **sizes[0]} if geometry.is_uniform else sizes


def _write_sizes(block: BlockGeometry) -> dict[str, Any]:
    # What was added later is left out where it says nothing, so that older versions read what they can.
    return {name: value for name, value in asdict(block).items() if value or name not in _ADDED_SIZES}


_ADDED_SIZES = ("rope", "gated", "cosine", "post_norm")


def _read_geometry(data: Any, version: int) -> Geometry:
    names = tuple(field.name for field in fields(BlockGeometry) if field.name not in _ADDED_SIZES)
    if version == 1:
        check_keys(_without_added(data), ("depth", *names), "mask.geometry")
        _check_size(data["depth"], MAX_DEPTH, "mask.geometry.depth")
        sizes = {name: value for name, value in data.items() if name != "depth"}
        geometry = Geometry((_read_sizes(sizes, "mask.geometry"),) * data["depth"])
    else:
        if not isinstance(data, list) or not 0 < len(data) <= MAX_DEPTH:
            raise ValueError(f"mask.geometry: wanted a list with the sizes of each block, got {shown(data)}")
        for index, sizes in enumerate(data):
            check_keys(_without_added(sizes), names, f"mask.geometry[{index}]")
        geometry = Geometry(tuple(_read_sizes(sizes, f"mask.geometry[{i}]") for i, sizes in enumerate(data)))
    entries = sum(math.prod(shape) for size in geometry.blocks for shape in _shapes(size).values())
    if entries > _MAX_ENTRIES:
        raise ValueError(f"mask.geometry: wanted at most {_MAX_ENTRIES} entries in all blocks together, got {entries}")
    return geometry


def _without_added(sizes: Any) -> Any:
    return {k: v for k, v in sizes.items() if k not in _ADDED_SIZES} if isinstance(sizes, dict) else sizes


def _read_sizes(sizes: Mapping[str, Any], where: str) -> BlockGeometry:
    for name, value in sizes.items():
        if name not in ("qk_norm", *_ADDED_SIZES):
            _check_size(value, MAX_SIZE, f"{where}.{name}")
        elif type(value) is not bool:
            raise ValueError(f"{where}.{name}: wanted a bool, got {shown(value)}")
    return BlockGeometry(**sizes)


def _check_size(value: Any, most: int, where: str) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{where}: wanted an int from 1 to {most}, got {shown(value)}")
