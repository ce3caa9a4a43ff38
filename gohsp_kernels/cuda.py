# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: constants folded, weights packed for the kernels in csrc/cuda, and the calls of the operators.

Inference on NVIDIA GPUs, in float16, bfloat16 and float32. Packing happens on first use and again when a parameter has
changed; packed weights live in a cache beside the parameters, as those of the CPU backend do.

LayerNorm's affine part folds into the matrix after it, in float64; layer scale and the softmax scale stay factors. The
kernels copy 16 bytes at a time, so packing pads: hidden neurons, the channels of each head and the depth of each matrix
to whole chunks of 16 bytes, with zeros that change no result. Tensors of the user are never padded.

Pruned input columns are left out in one of three forms (csrc/cuda/kernels.h): *direct*, where the weight is zero at
them; *chunks*, where chunks of 16 bytes without a kept column are skipped; *copy*, where the kept ones are first moved
together. The last costs a launch and a pass over x, and is taken where chunks would more than double the depth, where
rows of x are no multiples of 16 bytes, and for a LayerNorm in float32, whose mean would not survive a product in tf32.

Pruned output columns are left out only where they are the greater part. Otherwise they are computed with weights of
zero: rows that are written whole, 16 bytes at a time, cost less than the products that are saved.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _gpu, _native
from ._cache import PackedCache
from ._packing import double, fold_norm, kept_first, qk_norm_table, round_up
from .descriptors import Attention, AttentionSublayer, Descriptor, Linear, MlpSublayer, Sublayer
from .registry import PackedChain, Request, register

CHUNK_BYTES = 16
CHANNELS = 8  # heads begin at multiples of so many channels, and hidden neurons are padded to it
MANY_ROWS = 16384


def goes_first(device: torch.device, rows: int, capability: tuple[int, int] | None = None) -> bool:
    """Whether "auto" prefers this backend to Triton for a call on ``rows`` rows; docs/cuda.md gives the reasons.

    Measured on an H100: there it is faster at every size tried. On GPUs of capability 10 and later, whose own tensor
    core instructions Triton alone uses, nothing was measured: there it goes first only while a call is so short that
    starting its kernels takes longest.
    """
    if capability is None:
        capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else _gpu.OLDEST_CAPABILITY
    return capability < (10, 0) or rows <= MANY_ROWS


def _uses_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@dataclass(frozen=True)
class Packed:
    """A sublayer or a linear layer ready for the kernels.

    Attributes:
        weights: its matrices one behind the other, in the dtype of the activations.
        vectors: float32: bias, sums of rows and scale of each matrix, then the affine parts of the q and k norms; each
            padded to a multiple of 16 bytes.
        tables: int32: input chunks or columns, output columns, heads.
        layout: int64 on the CPU, kind and sizes; csrc/torch/cuda_ops.cpp reads it in this order.
        constants: eps, eps of the q and k norms, softmax scale.
    """

    weights: Tensor
    vectors: Tensor
    tables: Tensor
    layout: Tensor
    constants: tuple[float, float, float] = (0.0, 0.0, 1.0)


@dataclass
class _Parts:
    """Collects what goes into a :class:`Packed`, in the order in which it is read."""

    dtype: torch.dtype
    device: torch.device
    layout: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)

    def matrix(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None, row_sum: bool = False) -> None:
        """``weight`` [outputs, inputs], its depth padded to whole chunks."""
        rows, columns = weight.shape
        per_chunk = CHUNK_BYTES // self.dtype.itemsize
        stored = weight.new_zeros(rows, round_up(columns, per_chunk), dtype=self.dtype)
        stored[:, :columns] = weight.detach()
        self.weights.append(stored.flatten())
        # Sums of the weights as they are rounded: only those cancel against the product.
        sums = stored.double().sum(1) if row_sum else None
        vectors: dict[str, Any] = {"bias": bias, "row_sum": sums, "scale": scale}
        there = [name for name in _native.numbers("cuda_vectors") if vectors[name] is not None]
        parts = sum(1 << _native.numbers("cuda_vectors")[name] for name in there)
        self.layout += [rows, stored.shape[1] // per_chunk, parts]
        self.vectors += [vectors[name].detach().float() for name in there]

    def table(self, numbers: Tensor | None) -> None:
        """A list that the layout says is there or not."""
        self.layout.append(int(numbers is not None))
        if numbers is not None:
            self.tables.append(numbers.flatten())

    def packed(self, *constants: float) -> Packed:
        def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            return torch.cat([torch.empty(0, dtype=dtype, device=self.device), *(p.to(dtype) for p in parts)])

        return Packed(
            joined(self.weights, self.dtype),
            joined([F.pad(v.flatten(), (0, -v.numel() % 4)) for v in self.vectors], torch.float32),
            joined(self.tables, torch.int32),
            torch.tensor(self.layout, dtype=torch.int64),
            (*constants, *(0.0, 0.0, 1.0)[len(constants) :]),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class _Input:
    """How a product reads its input, and the weight that fits: see the head of the file."""

    form: str
    count: int
    table: Tensor | None
    weight: Tensor


def _arrange(weight: Tensor, in_cols: Tensor | None, features: int, dtype: torch.dtype, norm: bool) -> _Input:
    per_chunk = CHUNK_BYTES // dtype.itemsize
    kept = weight.shape[1]
    if features % per_chunk or (norm and dtype == torch.float32):
        return _Input("copy", kept, in_cols, weight)
    if in_cols is None:
        return _Input("direct", kept, None, weight)
    chunks = torch.unique(in_cols // per_chunk)
    if len(chunks) * per_chunk > 2 * kept:
        return _Input("copy", kept, in_cols, weight)
    places = torch.searchsorted(chunks, in_cols // per_chunk) * per_chunk + in_cols % per_chunk
    spread = weight.new_zeros(weight.shape[0], len(chunks) * per_chunk).index_copy(1, places, weight)
    if len(chunks) * per_chunk == features:
        return _Input("direct", features, None, spread)
    return _Input("chunks", spread.shape[1], chunks, spread)


@dataclass(frozen=True)
class _Output:
    """How a product writes its output: all columns in order, or those of a table, the computed ones first."""

    table: Tensor | None
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


def _spread(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out_cols: Tensor | None,
    features: int,
    dtype: torch.dtype,
) -> _Output:
    if out_cols is None:
        return _Output(None, weight, bias, scale)
    if 2 * len(out_cols) < features or features % (CHUNK_BYTES // dtype.itemsize):
        return _Output(kept_first(out_cols, features), weight, bias, scale)
    whole = (
        None if t is None else t.new_zeros(features, *t.shape[1:]).index_copy(0, out_cols, t.detach())
        for t in (weight.detach(), bias, scale)
    )
    return _Output(None, *whole)  # type: ignore[arg-type]


def _check_weights(x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"weights: wanted tensors on {x.device}, as x; got one on {tensor.device}")


def _pack_linear(linear: Linear, x: Tensor) -> Packed:
    features, out_features = x.shape[-1], linear.out_features
    _check_weights(x, linear.tensors)
    parts = _Parts(x.dtype, x.device, [features, out_features, _native.numbers("activations")[linear.activation]])
    target = _spread(linear.weight.detach(), linear.bias, None, linear.out_cols, out_features, x.dtype)
    source = _arrange(target.weight, linear.in_cols, features, x.dtype, norm=False)
    parts.matrix(source.weight, target.bias, None)
    parts.layout += [_native.numbers("cuda_inputs")[source.form], source.count]
    parts.table(source.table)
    parts.table(target.table)
    return parts.packed()


def _starts(widths: Sequence[int]) -> list[int]:
    """First channel of each head."""
    return list(itertools.accumulate(widths, initial=0))[:-1]


_Channels = tuple[list[int], list[int]]  # where channels are in compact weights, and where they go


def _channels(heads: Sequence[tuple[int, int, int]], base: int = 0, new_base: int = 0) -> _Channels:
    """Channels of heads given as (first channel, new first channel, width)."""
    old = [base + start + c for start, _, width in heads for c in range(width)]
    new = [new_base + start + c for _, start, width in heads for c in range(width)]
    return old, new


@dataclass(frozen=True)
class _Heads:
    """Where the channels of heads go in packed weights. Heads without V channels add nothing and are left out.

    Attributes:
        table: [heads, 6]: first q, k, v and output channel, QK width, V width with its padding.
        rows: of the qkv weight.
        columns: of the proj weight.
        qkv_channels, out_channels: of the packed weights.
        widest: most channels of a head.
    """

    table: tuple[tuple[int, ...], ...]
    rows: _Channels
    columns: _Channels
    qkv_channels: int
    out_channels: int
    widest: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(qk_widths: tuple[int, ...], v_widths: tuple[int, ...]) -> _Heads:
        kept = [h for h, width in enumerate(v_widths) if width > 0]
        qk, v = ([round_up(widths[h], CHANNELS) for h in kept] for widths in (qk_widths, v_widths))
        n_qk, new_n_qk = sum(qk_widths), sum(qk)
        qk_old, v_old, qk_new, v_new = map(_starts, (qk_widths, v_widths, qk, v))
        qk_moves = [(qk_old[h], qk_new[i], qk_widths[h]) for i, h in enumerate(kept)]
        v_moves = [(v_old[h], v_new[i], v_widths[h]) for i, h in enumerate(kept)]
        parts = (
            _channels(qk_moves),
            _channels(qk_moves, n_qk, new_n_qk),
            _channels(v_moves, 2 * n_qk, 2 * new_n_qk),
        )
        table = tuple(
            (qk_new[i], new_n_qk + qk_new[i], 2 * new_n_qk + v_new[i], v_new[i], qk_widths[h], v[i])
            for i, h in enumerate(kept)
        )
        widest = max((max(qk_widths[h], v[i]) for i, h in enumerate(kept)), default=0)
        rows = [c for old, _ in parts for c in old], [c for _, new in parts for c in new]
        return _Heads(table, rows, _channels(v_moves), 2 * new_n_qk + sum(v), sum(v), widest)


def _moved(tensor: Tensor, dim: int, channels: _Channels, size: int) -> Tensor:
    """Entries ``channels[0]`` of ``tensor`` along ``dim`` at ``channels[1]`` of ``size``, zeros elsewhere."""
    source, target = (torch.tensor(c, dtype=torch.int64, device=tensor.device) for c in channels)
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_zeros(shape).index_copy(dim, target, tensor.index_select(dim, source))


def pack_attention(sublayer: AttentionSublayer, x: Tensor) -> Packed:
    """An attention sublayer for activations like ``x`` [..., features]."""
    features = x.shape[-1]
    heads = _Heads.of(sublayer.qk_widths, sublayer.v_widths)
    qkv, bias = fold_norm(
        sublayer.qkv_weight, sublayer.qkv_bias, sublayer.norm_weight, sublayer.norm_bias, sublayer.in_cols
    )
    qkv = _moved(qkv, 0, heads.rows, heads.qkv_channels)
    bias = _moved(bias, 0, heads.rows, heads.qkv_channels)
    source = _arrange(qkv, sublayer.in_cols, features, x.dtype, norm=True)
    norm = qk_norm_table(*sublayer.norms) if heads.table else None
    norm_width = 0 if norm is None else norm.shape[1]
    kind = _native.numbers("sublayers")["attention"]
    parts = _Parts(x.dtype, x.device, [kind, features, len(heads.table), heads.widest, norm_width])
    parts.matrix(source.weight, bias, None, row_sum=source.form != "copy")
    proj = _moved(double(sublayer.proj_weight), 1, heads.columns, heads.out_channels)
    target = _spread(proj, sublayer.proj_bias, sublayer.layer_scale, sublayer.out_cols, features, x.dtype)
    parts.matrix(target.weight, target.bias, target.scale)
    parts.layout += [_native.numbers("cuda_inputs")[source.form], source.count]
    parts.table(source.table)
    parts.table(target.table)
    parts.tables.append(torch.tensor(heads.table, dtype=torch.int32, device=x.device).flatten())
    if norm is not None:
        parts.vectors.append(norm)
    return parts.packed(sublayer.eps, sublayer.qk_eps, sublayer.scale)


def pack_mlp(sublayer: MlpSublayer, x: Tensor) -> Packed:
    """An MLP sublayer for activations like ``x`` [..., features]."""
    features = x.shape[-1]
    fc1, bias = fold_norm(
        sublayer.fc1_weight, sublayer.fc1_bias, sublayer.norm_weight, sublayer.norm_bias, sublayer.in_cols
    )
    added = -fc1.shape[0] % CHANNELS  # neurons of zero: every activation keeps zero
    fc1, bias = (torch.cat([t, t.new_zeros(added, *t.shape[1:])]) for t in (fc1, bias))
    source = _arrange(fc1, sublayer.in_cols, features, x.dtype, norm=True)
    kind, activation = _native.numbers("sublayers")["mlp"], _native.numbers("activations")[sublayer.activation]
    parts = _Parts(x.dtype, x.device, [kind, features, activation])
    parts.matrix(source.weight, bias, None, row_sum=source.form != "copy")
    fc2 = F.pad(sublayer.fc2_weight, (0, added))
    target = _spread(fc2, sublayer.fc2_bias, sublayer.layer_scale, sublayer.out_cols, features, x.dtype)
    parts.matrix(target.weight, target.bias, target.scale)
    parts.layout += [_native.numbers("cuda_inputs")[source.form], source.count]
    parts.table(source.table)
    parts.table(target.table)
    return parts.packed(sublayer.eps)


_cache = PackedCache()
_PACK: dict[str, Callable[..., Packed]] = {
    "packed_linear": _pack_linear,
    "attention_sublayer": pack_attention,
    "mlp_sublayer": pack_mlp,
}


def packed(operator: Linear | Sublayer, x: Tensor) -> Packed:
    """The packed form for activations like ``x`` [..., features], from the cache or made now."""

    def pack() -> Packed:
        _check_weights(x, operator.tensors)
        return _PACK[operator.name](operator, x)

    constants = (x.dtype, x.shape[-1], *operator.constants)
    return _cache.get(operator.key, operator.tensors, constants, pack)


def run_packed(x: Tensor, sublayers: Sequence[Packed], num_queries: int) -> Tensor:
    """The native operator on packed sublayers, one after another. ``x``: [batch, tokens, features]."""
    return torch.ops.gohsp_kernels.cuda_sublayers(
        x,
        [s.weights for s in sublayers],
        [s.vectors for s in sublayers],
        [s.tables for s in sublayers],
        [s.layout for s in sublayers],
        [c for s in sublayers for c in s.constants],
        _uses_tf32(),
        num_queries,
    )


def packed_linear(linear: Linear, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.packed_linear`."""
    form = packed(linear, x)
    return torch.ops.gohsp_kernels.cuda_linear(
        x, form.weights, form.vectors, form.tables, form.layout, linear.out_features, _uses_tf32()
    )


@functools.cache  # without a limit: a captured graph reads the table by its address
def _head_table(qk_widths: tuple[int, ...], v_widths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [heads with V channels, 6], as in :class:`_Heads`, of qkv whose channels follow one another."""
    n_qk = sum(qk_widths)
    heads = zip(_starts(qk_widths), _starts(v_widths), qk_widths, v_widths, strict=True)
    table = [(q, n_qk + q, 2 * n_qk + v, v, qk_width, v_width) for q, v, qk_width, v_width in heads if v_width > 0]
    return torch.tensor(table, dtype=torch.int32, device=device).reshape(-1, 6)


def ragged_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.ragged_attention`."""
    widths = (*heads.qk_widths, *heads.v_widths)
    per_chunk = CHUNK_BYTES // qkv.element_size()
    return torch.ops.gohsp_kernels.cuda_attention(
        qkv,
        _head_table(heads.qk_widths, heads.v_widths, qkv.device),
        qk_norm_table(*heads.norms) if any(heads.v_widths) else None,
        heads.widest_head,
        all(width % per_chunk == 0 for width in widths),
        heads.scale,
        heads.eps,
        sum(heads.v_widths),
        num_queries,
        _uses_tf32(),
    )


def attention_sublayer(sublayer: AttentionSublayer, x: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.attention_sublayer`."""
    return run_packed(x, [packed(sublayer, x)], num_queries)


def mlp_sublayer(sublayer: MlpSublayer, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.mlp_sublayer`."""
    # Rows are independent here, so the whole batch is one image of many tokens.
    rows = x.reshape(1, -1, x.shape[-1]) if x.numel() else x.new_empty(1, 0, x.shape[-1])
    return run_packed(rows, [packed(sublayer, x)], rows.shape[1]).view(x.shape)


_RUN: dict[str, Callable[..., Tensor]] = {
    "packed_linear": packed_linear,
    "ragged_attention": ragged_attention,
    "attention_sublayer": attention_sublayer,
    "mlp_sublayer": mlp_sublayer,
}


class CudaBackend:
    """The kernels in CUDA C++ on NVIDIA GPUs, for inference."""

    name = "cuda"
    operators = _RUN.keys()
    parts: frozenset[str] = frozenset()

    def missing(self, request: Request) -> str:
        library = _native.load_cuda()
        if not library:
            return library.reason
        if reason := _gpu.missing_numbers(request):
            return reason
        if request.needs_grad:
            return "has no backward; call under torch.no_grad() or use the backend 'triton' or 'reference'"
        kind = request.device.type
        if kind != "cuda" or torch.version.hip:
            return f"runs on NVIDIA GPUs; got a tensor on {'hip' if kind == 'cuda' else kind}"
        reason = _gpu.missing_device(request)
        if reason or request.capability is not None:  # of a GPU that need not be there
            return reason
        index = request.device.index
        return _native.cuda_missing(torch.cuda.current_device() if index is None else index)

    def only_named(self, request: Request) -> str:
        return _gpu.ON_CPU if request.device.type == "cpu" else ""

    def priority(self, request: Request) -> int:
        """Above Triton's where it is faster, below elsewhere."""
        first = request.device.type != "cuda" or goes_first(request.device, request.rows, request.capability)
        return 20 if first else 5

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        return _RUN[operator.name](operator, x, num_queries)

    def chain(self, x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain:
        return PackedChain(x, sublayers, packed, run_packed)


register(CudaBackend())
