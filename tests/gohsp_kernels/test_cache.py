# SPDX-License-Identifier: Apache-2.0
"""Packed weights on streams and in captures of a GPU that is not there: CPU tensors, with CUDA's calls noted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gohsp_kernels import _cache, cuda, registry
from gohsp_kernels._cache import PackedCache
from gohsp_kernels.descriptors import OPERATORS
from gohsp_kernels.testing import Maker


class Stream:
    """Work is launched on it, and is done once somebody has waited."""

    def __init__(self) -> None:
        self.running: list[Callable[[], object]] = []
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1
        for work in self.running:
            work()
        self.running.clear()


class Form:
    """A packed form, written by the stream that is current when it is made."""

    def __init__(self, value: Tensor, stream: Stream) -> None:
        self.parts = [torch.zeros_like(value), (torch.zeros(2), None)]
        result = value.clone()
        stream.running.append(lambda: self.parts[0].copy_(result))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The stream that is current, whether it captures, and (tensor, stream) of each record_stream."""
    state = SimpleNamespace(stream=Stream(), capturing=False, recorded=[])
    monkeypatch.setattr(_cache, "GPU", "cpu")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    record = lambda tensor, stream: state.recorded.append((id(tensor), stream))  # noqa: E731
    monkeypatch.setattr(Tensor, "record_stream", record)
    monkeypatch.setattr(_cache, "_captured", [])
    yield state


class Weights:
    """Something packed, and how often it was."""

    def __init__(self, gpu: SimpleNamespace, through: str) -> None:
        self.weight, self.packings = torch.arange(3.0), 0
        self.gpu, self.cache = gpu, PackedCache()
        sublayer: Any = SimpleNamespace(tensors=[self.weight], check=lambda features: None)
        self.chain = registry.PackedChain(torch.zeros(1, 1, 3), [sublayer], self.pack, lambda *_: _[0])
        self.through = through

    def pack(self, *_: object) -> Form:
        self.packings += 1
        return Form(self.weight, self.gpu.stream)

    def get(self) -> Form:
        if self.through == "chain":
            return self.chain.current()[0]
        return self.cache.get(self.weight, [self.weight], (), self.pack)


@pytest.fixture(params=["cache", "chain"])
def weights(gpu: SimpleNamespace, request: pytest.FixtureRequest) -> Weights:
    return Weights(gpu, request.param)


def test_another_stream_reads_what_is_packed(gpu: SimpleNamespace, weights: Weights) -> None:
    first = gpu.stream
    weights.get()
    gpu.stream = Stream()
    assert torch.equal(weights.get().parts[0], weights.weight)
    for _ in range(3):
        weights.get()
    assert (first.waits, gpu.stream.waits, weights.packings) == (1, 0, 1)  # no call waits that packs nothing
    weights.weight.mul_(2)
    assert torch.equal(weights.get().parts[0], weights.weight) and gpu.stream.waits == 1


def test_memory_is_not_used_again_under_the_streams_that_read_it(gpu: SimpleNamespace, weights: Weights) -> None:
    packer = gpu.stream
    form = weights.get()
    assert gpu.recorded == []  # the allocator knows the stream that the memory was given to
    others = [Stream(), Stream()]
    for gpu.stream in (*others, packer, *others):
        assert weights.get() is form
    tensors = [form.parts[0], form.parts[1][0]]
    assert gpu.recorded == [(id(tensor), other) for other in others for tensor in tensors]
    weights.weight.mul_(2)
    gpu.stream, gpu.recorded = packer, []
    again = weights.get()
    gpu.stream = others[0]
    weights.get()
    assert gpu.recorded == [(id(tensor), others[0]) for tensor in (again.parts[0], again.parts[1][0])]


def test_what_a_foreign_capture_reads_stays(gpu: SimpleNamespace, weights: Weights) -> None:
    weights.get()
    gpu.capturing = True
    read = weakref.ref(weights.get())
    gpu.capturing = False
    weights.weight.mul_(2)
    weights.get()
    gc.collect()
    assert weights.packings == 2 and read() is not None


def test_what_one_capture_packs_no_other_call_reads(gpu: SimpleNamespace, weights: Weights) -> None:
    """It is written when that graph runs, and perhaps never."""
    gpu.capturing = True
    first = weights.get()
    assert gpu.stream.waits == 0  # a stream that captures cannot be waited for
    gpu.stream = Stream()
    assert weights.get() is not first
    gpu.capturing = False
    assert torch.equal(weights.get().parts[0], weights.weight)
    assert weights.packings == 3


def test_a_capture_of_ones_own_holds_what_it_reads_no_longer_than_itself(
    gpu: SimpleNamespace, weights: Weights
) -> None:
    weights.get()
    gpu.capturing = True
    with _cache.keeping() as kept:
        read = weakref.ref(weights.get())
    gpu.capturing = False
    weights.weight.mul_(2)
    weights.get()
    gc.collect()
    assert read() is not None
    kept.clear()
    gc.collect()
    assert read() is None


def test_packed_forms_of_the_backends_show_all_their_tensors(gpu: SimpleNamespace) -> None:
    from gohsp_kernels.triton import operators

    call = Maker(1).attention_sublayer(2, 9, 24, [8, 5], [8, 3], 17, 20)
    sublayer: Any = call.operator
    form = operators.packed(sublayer, call.x)
    names = ("weight", "bias", "row_sum", "scale", "in_cols", "out_cols")
    parts = [getattr(linear, name) for linear in (form.qkv, form.proj) for name in names]
    expected = {id(t) for t in (*parts, *form.norms, form.layout.table) if t is not None}
    assert {id(t) for t in _cache._tensors_of([form])} == expected
    if cuda._native.load():
        packed = cuda.packed(sublayer, call.x.half())
        expected = {id(t) for t in (packed.weights, packed.vectors, packed.tables, packed.layout)}
        assert {id(t) for t in _cache._tensors_of(packed)} == expected


def test_tables_of_heads_stay_where_a_graph_has_read_them() -> None:
    table = weakref.ref(cuda._head_table((8, 8), (8, 8), torch.device("cpu")))
    for width in range(1100):
        cuda._head_table((width + 1,), (1,), torch.device("cpu"))
    gc.collect()
    assert table() is not None


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_inductor_leaves_the_operators_out_of_its_graphs(name: str) -> None:
    """It would capture a comparison of weights, and its pool of memory may hold nothing that it does not know."""
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    graph = torch.fx.Graph()
    node = graph.call_function(getattr(torch.ops.gohsp_kernels, name).default, ())
    assert is_cudagraph_unsafe_fx_node(node)
