# SPDX-License-Identifier: Apache-2.0
"""A vision transformer as pruning sees it, whatever its classes call their parts.

An adapter (:class:`Family`) opens a model once. What it gives, an :class:`OpenModel` of :class:`OpenBlock` of
:class:`Attention` and :class:`Mlp`, refers to the model's own modules: to write to a :class:`Projection` is to write to
the model. Ranking, pruning, masks, layers and training see these objects and never a name of a library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gohsp_kernels import ACTIVATIONS
from gohsp_kernels.reference import added_scores, logit_factors, turned

MAX_SIZE = 2**16
"""Of a width or a number of heads in a file: what is larger is taken for damage before memory is asked for."""

MAX_DEPTH = 10_000
"""Of a model in a file, in blocks."""

LEAST_GAIN = 0.1
"""Of a norm behind a sublayer, beside the root mean square of all: what is smaller is undone by less than it has."""


@dataclass(frozen=True)
class BlockGeometry:
    """Sizes of one dense transformer block.

    Attributes:
        dim: D, the width of the residual stream.
        num_heads: H, attention heads.
        head_dim: d, channels of a head in each of q, k and v. H * d need not equal D.
        hidden: M, neurons of the MLP.
        qk_norm: Whether q and k are normalised head by head. Such a norm mixes the channels of a head.
        rope: Whether q and k are turned by rotary positions, pair by pair of their channels.
        gated: Whether the MLP has a gate for each neuron.
        cosine: Whether scores are cosines: q and k are divided by their lengths.
        post_norm: Whether norms stand behind both halves and not in front of them.
    """

    dim: int
    num_heads: int
    head_dim: int
    hidden: int
    qk_norm: bool = False
    rope: bool = False
    gated: bool = False
    cosine: bool = False
    post_norm: bool = False

    @property
    def writes_whole(self) -> str:
        """Why every residual feature is written, or the empty string where single ones may not be."""
        return "the norm behind a sublayer mixes the features that it writes" if self.post_norm else ""

    @property
    def qk_whole(self) -> str:
        """Why a head keeps all of its QK channels or goes, or the empty string where single ones may go."""
        if self.qk_norm:
            return "qk-norm mixes the channels of a head"
        if self.cosine:
            return "cosine attention divides the channels of a head by their length"
        return "rotary positions turn the channels of a head in pairs" if self.rope else ""

    @property
    def span(self) -> int:
        """Channels of all heads together, H * d."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class Geometry:
    """Sizes of a dense vision transformer, block by block.

    The sizes of a block can be asked of the whole as well (``geometry.num_heads``) where all blocks agree on them.

    Attributes:
        blocks: Of each block, in the order of the data.
    """

    blocks: tuple[BlockGeometry, ...]

    @classmethod
    def uniform(cls, depth: int, **sizes: Any) -> Geometry:
        """Return the geometry of ``depth`` blocks that are all alike, with the ``sizes`` of :class:`BlockGeometry`."""
        return cls((BlockGeometry(**sizes),) * depth)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are of one size."""
        return len(set(self.blocks)) == 1

    @property
    def dim(self) -> int:
        """D of every block."""
        return int(self._shared("dim"))

    @property
    def num_heads(self) -> int:
        """H of every block."""
        return int(self._shared("num_heads"))

    @property
    def head_dim(self) -> int:
        """d of every block."""
        return int(self._shared("head_dim"))

    @property
    def hidden(self) -> int:
        """M of every block."""
        return int(self._shared("hidden"))

    @property
    def qk_norm(self) -> bool:
        """Whether every block has norms on q and k."""
        return bool(self._shared("qk_norm"))

    @property
    def gated(self) -> bool:
        """Whether every block has a gated MLP."""
        return bool(self._shared("gated"))

    def _shared(self, name: str) -> Any:
        values = {getattr(block, name) for block in self.blocks}
        if len(values) != 1:
            raise ValueError(f"geometry.{name}: wanted blocks that agree on it; got {sorted(values)}")
        return values.pop()

    def __str__(self) -> str:
        if not self.is_uniform:
            return f"Geometry(blocks={list(self.blocks)})"
        return f"Geometry(depth={self.depth}, {str(self.blocks[0]).partition('(')[2]}"


class Projection:
    """A linear map of a sublayer: one linear layer, or several that read the same and whose outputs lie side by side.

    Args:
        layers: In the order of their outputs. The attention of some libraries has one for each of q, k and v.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs]. Of one layer its parameter, of several a copy: :meth:`write_` changes either."""
        weights = [layer.weight for layer in self.layers]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @property
    def bias(self) -> Tensor | None:
        """[outputs], zero where a layer has none; None where no layer has one."""
        if all(layer.bias is None for layer in self.layers):
            return None
        if len(self.layers) == 1:
            return self.layers[0].bias
        return torch.cat(
            [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in self.layers]
        )

    @property
    def has_bias(self) -> bool:
        """Whether every output has a bias of its own, so that a bias can be written."""
        return all(layer.bias is not None for layer in self.layers)

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.layers[0].in_features

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return sum(layer.out_features for layer in self.layers)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [..., outputs] for x [..., inputs], by calls of the layers."""
        products = [layer(x) for layer in self.layers]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    @torch.no_grad()
    def write_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Overwrite the weights [outputs, inputs] and, where one is given, the bias [outputs].

        Layers without a bias are passed over: theirs is zero.
        """
        sizes = [layer.out_features for layer in self.layers]
        for layer, rows in zip(self.layers, weight.split(sizes), strict=True):
            layer.weight.copy_(rows)
        if bias is not None:
            for layer, values in zip(self.layers, bias.split(sizes), strict=True):
                if layer.bias is not None:
                    layer.bias.copy_(values)

    def rows_by_head(self, weight: Tensor, num_heads: int) -> Tensor:
        """View a matrix like that of one layer, [parts H d, inputs], as [H, parts, d, inputs]; parts are q, k and v."""
        return weight.view(-1, num_heads, self.out_features // (3 * num_heads), weight.shape[1]).transpose(0, 1)

    def columns_by_head(self, weight: Tensor, num_heads: int) -> Tensor:
        """View a matrix like that of one layer, [outputs, H d], as [H, outputs, d]."""
        return weight.view(len(weight), num_heads, -1).transpose(0, 1)

    def watch_inputs(self, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Let each call read what a function gives for the inputs [..., inputs], until the handle is removed."""
        return self.layers[0].register_forward_pre_hook(lambda _, inputs: function(inputs[0]))

    @torch.no_grad()
    def clear_(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Set outputs (rows, with their biases) and inputs (columns) to zero.

        Args:
            rows, columns: Bool [outputs] and [inputs], True = becomes zero; None for none.
        """
        start = 0
        for layer in self.layers:
            if rows is not None:
                mine = rows[start : start + layer.out_features].to(layer.weight.device)
                layer.weight[mine] = 0
                if layer.bias is not None:
                    layer.bias[mine] = 0
            if columns is not None:
                layer.weight[:, columns.to(layer.weight.device)] = 0
            start += layer.out_features


@dataclass(frozen=True)
class Trace:
    """What happened within a sublayer.

    Attributes:
        seen: What ``read`` reads, [B, N, D].
        read: What it gave, [B, N, r].
        hidden: What ``write`` reads, [B, N, m].
        given: What ``write`` gave, [B, N, D].
        after: The residual stream after the sublayer, [B, N, D].
    """

    seen: Tensor
    read: Tensor
    hidden: Tensor
    given: Tensor
    after: Tensor


@dataclass(frozen=True)
class Sublayer:
    """One residual half of a block: ``x + scale(body(norm(x)))``, where the body ends in ``write``.

    Where the geometry has ``post_norm``, it is ``x + scale(norm(body(x)))``.

    Attributes:
        prefix: "attn" or "mlp", as in the names of groups.
        norm: Norm over the features of the residual stream.
        body: The attention or MLP module.
        read: Its first linear map (q, k and v; or fc1).
        write: Its last linear map (proj or fc2), whose inputs are head outputs or hidden neurons.
        scale: Layer scale, a module with ``gamma`` [D], or ``nn.Identity``.
        drop_path: Module between scale and residual stream.
        geometry: Sizes of the block.
    """

    prefix: ClassVar[str]

    norm: Any
    body: Any
    read: Projection
    write: Projection
    scale: Any
    drop_path: nn.Module
    geometry: BlockGeometry

    def __call__(self, x: Tensor) -> Tensor:
        """Return the residual stream after this sublayer in evaluation mode, [B, N, D] from [B, N, D]."""
        return self.trace(x).after

    def enter(self, x: Tensor) -> Tensor:
        """Return the residual stream as this sublayer reads it, for that behind the one before it.

        The two are the same but where a model has something between its blocks, which may change all sizes.
        """
        return x

    @property
    def norms(self) -> tuple[Any, ...]:
        """What stands between the residual stream and ``read``, in the order of the data, or behind ``write``."""
        return (self.norm,)

    def seen(self, x: Tensor) -> Tensor:
        """Return what ``read`` reads for the residual stream, [B, N, D] from [B, N, D]."""
        for norm in () if self.geometry.post_norm else self.norms:
            x = norm(x)
        return x

    def trace(self, x: Tensor) -> Trace:
        """Compute step by step what the model does in evaluation mode, and return all of it.

        Nothing of the model is changed meanwhile, so that several threads may do so. ``body`` is not called: libraries
        differ in what theirs take and give.
        """
        seen = self.seen(x)
        read = self.read(seen)
        hidden = self.hidden(read)
        given = self.write(hidden)
        return Trace(seen, read, hidden, given, x + self.adds(given))

    def adds(self, given: Tensor) -> Tensor:
        """Return what the sublayer adds to the residual stream [B, N, D], for what ``write`` gave, [B, N, D]."""
        return cast(Tensor, self.scale(self.norm(given) if self.geometry.post_norm else given))

    def hidden(self, read: Tensor) -> Tensor:
        """Return what ``write`` reads [B, N, m], for what ``read`` gave [B, N, r]."""
        raise NotImplementedError

    def judged(self, trace: Trace) -> Tensor:
        """Return the part of a trace that errors of the sublayer are measured in, [B, N, D].

        The residual stream; what ``write`` gave, where a norm lies between, which makes other errors of these.
        """
        return trace.given if self.geometry.post_norm else trace.after

    def weigh(self, trace: Trace, weights: Tensor) -> Tensor:
        """Return how much errors of the rows that ``write`` gives count, [B, N], for weights of the tokens, [N].

        A norm between divides rows by their length, and their errors with it.
        """
        if not self.geometry.post_norm:
            return weights.expand(trace.given.shape[:2])
        return weights / _lengths(self.norm, trace.given)[..., 0].square()

    def wanted(self, trace: Trace, gap: Tensor) -> Tensor:
        """Return what ``write`` should give so that the sublayer adds ``gap`` to the residual stream, [B, N, D].

        A norm is undone to first order, about what ``write`` gives: its mean and its length are free, and stay.
        """
        if self.geometry.post_norm:
            return _before_norm(self.norm, self.layer_scale(), trace.given, gap)
        return (gap * _inverse(self.gain())).to(gap.dtype)

    def gain(self) -> Tensor:
        """Return what an output of ``write`` is multiplied by on its way to where errors are measured, float64 [D].

        The layer scale; ones where there is none, or where they are measured in what ``write`` gives.
        """
        gain = self.layer_scale()
        return torch.ones_like(gain) if self.geometry.post_norm else gain

    def layer_scale(self) -> Tensor:
        """Return the layer scale as float64 [D]; ones where there is none."""
        gamma = getattr(self.scale, "gamma", None)
        weight = self.write.weight
        return weight.new_ones(weight.shape[0], dtype=torch.float64) if gamma is None else gamma.detach().double()

    def written(self) -> Tensor:
        """Return the weight of ``write`` times :meth:`gain`: float64 [D, m]."""
        return self.write.weight.detach().double() * self.gain()[:, None]


def _inverse(gain: Tensor) -> Tensor:
    """One over some factors; 0 for 0, as a feature that is never written asks for nothing."""
    return torch.where(gain == 0, 0.0, 1 / gain)


def _before_norm(norm: Any, scale: Tensor, given: Tensor, gap: Tensor) -> Tensor:
    """Return what a norm and a layer scale [D] make ``gap`` of, to first order about ``given``, both [B, N, D].

    What is wanted beyond what ``given`` becomes goes back through the derivative of the norm, token by token.
    """
    wide, has_mean = given.double(), _has_mean(norm)
    level = _lengths(norm, given)
    unit = (wide - wide.mean(dim=-1, keepdim=True) if has_mean else wide) / level
    becomes = norm(given).double() * scale
    gain = scale * norm.weight.detach().double()
    # A feature of next to no gain would ask for so much that the norm made all others small.
    change = (gap.double() - becomes) * gain / (gain.square() + LEAST_GAIN**2 * gain.square().mean() + 1e-30)
    change = change - change.mean(dim=-1, keepdim=True) if has_mean else change
    change = change - unit * (unit * change).mean(dim=-1, keepdim=True)
    return (wide + level * change).to(gap.dtype)


def _has_mean(norm: nn.Module) -> bool:
    """Return whether a norm takes the mean away first."""
    return not isinstance(norm, nn.RMSNorm | RmsNorm)


def _lengths(norm: Any, x: Tensor) -> Tensor:
    """Return what a norm divides rows [B, N, D] by, float64 [B, N, 1]."""
    wide = x.double()
    centred = wide - wide.mean(dim=-1, keepdim=True) if _has_mean(norm) else wide
    return (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()


@dataclass(frozen=True)
class Windows:
    """Which tokens attend to each other, where not all of an image do: those of one window.

    Attributes:
        order: int64 [windows, n], the tokens of each window; every token is in one.
    """

    order: Tensor

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens window by window, [B * windows, n, m] from [B, N, m]."""
        return x.index_select(1, self.order.flatten()).unflatten(1, self.order.shape).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """Undo :meth:`split`."""
        inverse = self.order.flatten().argsort()
        return x.unflatten(0, (-1, len(self.order))).flatten(1, 2).index_select(1, inverse)


@dataclass(frozen=True)
class ScoreBias:
    """What is added to the scores of each query and key, by head: for their relative position, and as a mask.

    Attributes:
        source: Gives the table, [positions, H]: a parameter or a view of one, or what is computed of some, anew at each
            call.
        index: int64 [N, N], the row of the table for each query and key.
        trains: Whether training changes the table.
        mask: [windows, N, N], added to the scores of every head of a window; None for none.
    """

    source: Callable[[], Tensor]
    index: Tensor
    trains: bool
    mask: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """What is added for each relative position and head, [positions, H]."""
        return self.source()

    def __call__(self, batch: int) -> Tensor:
        """Return the biases for so many sequences, [batch or 1, H, N, N]."""
        bias = added_scores(self.table, self.index, self.mask, batch)
        assert bias is not None
        return bias


@dataclass(frozen=True)
class Attention(Sublayer):
    """The attention half of a block. ``read`` gives all q, then all k, then all v, head after head.

    Attributes:
        softmax_scale: What q k is multiplied by before the softmax.
        q_norm, k_norm: LayerNorms of the channels of a head, or ``nn.Identity``.
        drop: Dropout of the attention probabilities, with its probability ``p``.
        write_drop: Dropout after ``write``.
        inner_norm: Norm of the outputs of all heads, side by side, or ``nn.Identity``.
        rope: Rotary positions, float [2, H or 1, N, d / 2]: cosine and sine of the angle of each pair of channels of q
            and k, for the tokens of an image of the model's own size; None where there are none.
        rope_pairs: Which channels are a pair; see :func:`gohsp_kernels.ragged_attention`.
        bias: What is added to the scaled scores, or None.
        logit_scale: [H], of cosine attention, as :func:`gohsp_kernels.ragged_attention` has it; None without.
        windows: Which tokens attend to each other, or None where all do.
        transition: What the model has between the block before and this one; None for nothing.
    """

    softmax_scale: float
    q_norm: Any
    k_norm: Any
    drop: Any
    write_drop: nn.Module
    inner_norm: Any = field(default_factory=nn.Identity)
    rope: Tensor | None = None
    rope_pairs: str = "halves"
    bias: ScoreBias | None = None
    logit_scale: Tensor | None = None
    windows: Windows | None = None
    transition: Callable[[Tensor], Tensor] | None = None
    prefix: ClassVar[str] = "attn"

    def enter(self, x: Tensor) -> Tensor:
        return x if self.transition is None else self.transition(x)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, [B, H, N, d] each, of what ``read`` gave, [B, N, 3 H d]. Norms are not applied."""
        size = self.geometry
        q, k, v = qkv.unflatten(-1, (3, size.num_heads, size.head_dim)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def probabilities(self, read: Tensor) -> Tensor:
        """Return softmax(Q K^T) of each head [B, H, N, N] for what ``read`` gave, [B, N, 3 H d].

        Where tokens attend in windows, B counts these.
        """
        q, k, _ = self.split(read if self.windows is None else self.windows.split(read))
        q, k = self._finished(q, k)
        scores = q * self.softmax_scale @ k.mT
        return (scores if self.bias is None else scores + self.bias(len(q))).softmax(dim=-1)

    def hidden(self, read: Tensor) -> Tensor:
        """Return the outputs of all heads side by side, [B, N, H d], for what ``read`` gave, [B, N, 3 H d]."""
        q, k, v = self.split(read if self.windows is None else self.windows.split(read))
        bias = None if self.bias is None else self.bias(len(q))
        heads = F.scaled_dot_product_attention(*self._finished(q, k), v, bias, scale=self.softmax_scale)
        heads = heads.transpose(1, 2).flatten(2)
        inner: Tensor = self.inner_norm(heads if self.windows is None else self.windows.join(heads))
        return inner

    def _finished(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [B, H, N, d] behind their norms, turned by their positions."""
        q, k = self.q_norm(q), self.k_norm(k)
        if self.logit_scale is not None:
            factors = logit_factors(self.logit_scale)[:, None, None]
            q, k = F.normalize(q, dim=-1) * factors, F.normalize(k, dim=-1)
        if self.rope is None:
            return q, k
        return turned(q, self.rope, self.rope_pairs), turned(k, self.rope, self.rope_pairs)


@dataclass(frozen=True)
class Mlp(Sublayer):
    """The MLP half of a block.

    Attributes:
        activation: Its name in ``gohsp_kernels.ACTIVATIONS``.
        drop: Dropout of the neurons.
        write_drop: Dropout after ``write``.
        gate: "first" or "last" where half of what ``read`` gives, [B, N, 2 M], are gates: the activation is on these,
            and what it gives is multiplied by the other half; empty where there are none.
        inner_norm: Norm of the hidden neurons, or ``nn.Identity``.
        own_norm: A norm behind ``norm`` that the MLP begins with, or ``nn.Identity``.
    """

    activation: str
    drop: nn.Module
    write_drop: nn.Module
    gate: str = ""
    inner_norm: Any = field(default_factory=nn.Identity)
    own_norm: Any = field(default_factory=nn.Identity)
    prefix: ClassVar[str] = "mlp"

    @property
    def norms(self) -> tuple[Any, ...]:
        return self.norm, self.own_norm

    def hidden(self, read: Tensor) -> Tensor:
        """Return what ``write`` reads of the hidden neurons [B, N, M], for what ``read`` gave."""
        activation = ACTIVATIONS[self.activation]
        if self.gate:
            first, last = read.chunk(2, dim=-1)
            hidden = activation(first) * last if self.gate == "first" else first * activation(last)
        else:
            hidden = activation(read)
        inner: Tensor = self.inner_norm(hidden)
        return inner

    def rows(self, neurons: Tensor) -> Tensor:
        """Return the rows of ``read`` that make some neurons, int64 or bool as these; those of a gate too."""
        if not self.gate:
            return neurons
        return torch.cat((neurons, neurons if neurons.dtype == torch.bool else neurons + self.geometry.hidden))


@dataclass(frozen=True)
class OpenBlock:
    """One block of a dense model.

    Attributes:
        module: The block itself.
        attention, mlp: Its halves, in the order of the data.
    """

    module: Any
    attention: Attention
    mlp: Mlp

    def __call__(self, x: Tensor) -> Tensor:
        """Return the residual stream after the block in evaluation mode, [B, N, D] from [B, N, D]."""
        return self.mlp(self.attention(x))

    @property
    def geometry(self) -> BlockGeometry:
        """Sizes of the block."""
        return self.attention.geometry

    @property
    def sublayers(self) -> tuple[Attention, Mlp]:
        """Both halves."""
        return self.attention, self.mlp


@dataclass(frozen=True)
class OpenModel:
    """A dense model, opened.

    Attributes:
        model: The model itself.
        family: What opened it.
        blocks: Its blocks, in the order of the data.
    """

    model: Any
    family: Family
    blocks: tuple[OpenBlock, ...]

    @property
    def geometry(self) -> Geometry:
        """Sizes of all blocks."""
        return Geometry(tuple(block.geometry for block in self.blocks))

    @property
    def sublayers(self) -> list[Attention | Mlp]:
        """The sublayers in the order of the data: attention and MLP of each block in turn."""
        return [half for block in self.blocks for half in block.sublayers]

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens [B, N, D] that the first block reads, for images [B, C, height, width]."""
        return self.family.embed(self.model, images)

    def features(self, x: Tensor) -> Tensor:
        """Return what the head reads, [B, features] or [B, n, features], for the residual stream [B, N, D]."""
        return self.family.features(self.model, x)


class CompactBlock(nn.Module):
    """What the blocks of compressed models have in common, whatever family they are of.

    Attributes:
        mask: What is kept of the dense block.
        geometry: Sizes of the dense block.
    """

    mask: Any
    geometry: BlockGeometry

    def halves(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        """Return the modules of the attention half and those of the MLP half."""
        raise NotImplementedError


class CompressedModel:
    """Marks the classes of compressed models; each derives from its dense class as well."""


class BlockFamily(ABC):
    """Adapter for blocks that stand in models of whatever class; see :func:`gohsp.compress_block`."""

    @abstractmethod
    def open_block(self, block: nn.Module) -> OpenBlock | None:
        """Return a single dense block, in a model of whatever class; None where it is none of the family's.

        Raises:
            ValueError: It is, but holds something that cannot be pruned exactly; the message gives the reason.
        """

    def dress(self, compact: CompactBlock, block: nn.Module) -> CompactBlock:
        """Return a compact block as callers of the dense one call it."""
        return compact

    def keeps_hook(self, hook: Any) -> bool:
        """Return whether a hook on a block is the library's own, which it hangs on the compact block again."""
        return False


class Family(BlockFamily):
    """Adapter for a family of models: the one place that knows the names and the ways of their library.

    A family is registered by :func:`gohsp.models.registry.register`. Its methods take dense models of the family and
    those that :meth:`assemble` made; frozen ones too, where nothing else is said.

    Attributes:
        wanted: What it takes, for messages, such as "a timm VisionTransformer".
    """

    wanted: str

    @abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """Return whether a model is of this family; judged by its class alone.

        Subclasses count: tools that shard a model put one in the place of its class. :meth:`open_blocks` may refuse
        them.
        """

    @abstractmethod
    def open_blocks(self, model: nn.Module) -> tuple[OpenBlock, ...]:
        """Return the blocks of a dense model.

        Raises:
            TypeError: The model is of a class that may compute something else.
            ValueError: A block holds something that cannot be pruned exactly; the message names it and the reason.
        """

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        return None  # none of its blocks is taken alone

    @abstractmethod
    def architecture(self, model: nn.Module) -> str:
        """Return the name of the architecture for masks and reports."""

    @abstractmethod
    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the tokens [B, N, D] that the first block reads, for images [B, C, height, width]."""

    @abstractmethod
    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return what the head of a model reads, for the residual stream [B, N, D] behind the last block."""

    def answers(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Return the logits [B, classes] for the residual stream [B, N, D] behind the last block.

        None where the model has no classifier, or the family does not say.
        """
        return None

    def classes(self, model: Any) -> int:
        """Return how many classes the logits tell apart: the model's ``num_classes``, or 0 where it has none."""
        return int(getattr(model, "num_classes", 0))

    def normalisation(self, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and deviation that pixels from 0 to 1 are normalised with, one each or one for each channel.

        One half of each where the family does not say.
        """
        return (0.5,), (0.5,)

    @abstractmethod
    def stream_places(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules whose outputs are the residual stream: each block, and the norm behind the last one."""

    @abstractmethod
    def stream_shape(self, model: nn.Module) -> tuple[int, int, int]:
        """Return (blocks, tokens, features) of the residual stream, for images of the model's own size."""

    @abstractmethod
    def image_shape(self, model: nn.Module) -> tuple[int, int, int] | None:
        """Return (channels, height, width) of the images that it is made for, or None where any size will do."""

    @abstractmethod
    def tokens(self, model: nn.Module, height: int, width: int) -> int:
        """Return how many tokens the blocks see for images of a size.

        Raises:
            ValueError: The model is fixed to another size.
        """

    def attended(self, model: nn.Module, height: int, width: int) -> list[tuple[int, int]] | None:
        """Return for each block how many tokens it sees, and to how many each attends, for images of a size.

        None where every block sees the tokens that :meth:`tokens` tells of, and each attends to all.
        """
        return None

    @abstractmethod
    def modules_outside(self, model: nn.Module, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        """Return what multiplies before and after the blocks, each with the shape of its input for one image."""

    @abstractmethod
    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        """Return a copy of a dense model with compact blocks in the place of its own."""

    def taken_over(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules outside the blocks that a compressed model has not: its blocks do their work."""
        return []

    def left_alone(self, model: nn.Module) -> list[tuple[str, str]]:
        """Return the names of blocks of attention and MLP that stay as they are, each with the reason."""
        return []

    def refresh(self, model: nn.Module) -> None:
        """Bring up to date what the blocks of a compressed model hold of the rest of it, and what no file holds.

        Called when its parameters were loaded, and before its blocks are packed for good.
        """

    @abstractmethod
    def disassemble(self, model: nn.Module) -> nn.Module:
        """Return a copy of a compressed model whose blocks are the family's own modules and plain PyTorch.

        Raises:
            ValueError: A weight is computed from other tensors.
        """

    @abstractmethod
    def freeze(self, model: nn.Module, blocks: nn.Module, embedding: str = "float32") -> nn.Module:
        """Return a copy of a compressed model with packed blocks, and with what else can be packed outside them.

        Args:
            model: It is not changed.
            blocks: In place of the model's own.
            embedding: Format of the weights of a packed patch embedding.
        """

    @abstractmethod
    def describe(self, model: nn.Module, geometry: Geometry) -> dict[str, Any]:
        """Return plain JSON values from which :meth:`build` makes the dense model of a compressed one."""

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        """Refuse a description that cannot give a dense model of some sizes, before :meth:`build` spends time on it.

        Raises:
            ValueError: It cannot. A family that does not override this leaves the refusal to :meth:`build`.
        """

    @abstractmethod
    def build(self, description: Mapping[str, Any]) -> nn.Module:
        """Return the dense model of a description, its parameters on the meta device.

        Raises:
            ValueError: It does not describe one.
        """


def wrong_kind(wanted: str, model: nn.Module, way_out: str = "") -> TypeError:
    """Return the error for a model that is not what is wanted."""
    return TypeError(f"model: wanted {wanted}, got {type(model).__module__}.{type(model).__name__}{way_out}")


def logits_of(answer: Any) -> Any:
    """Return the logits [B, classes] of what a model gave: itself, or the part of that name of an output object."""
    return getattr(answer, "logits", answer)


def count_parameters(*modules: nn.Module) -> int:
    """Return the number of parameters of some modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
