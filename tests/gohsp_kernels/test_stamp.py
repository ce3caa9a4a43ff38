# SPDX-License-Identifier: Apache-2.0
"""A stamp notices every change of the tensors it was made of, by whatever way it came."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import gohsp_kernels as gk
from gohsp_kernels import _native, _stamp
from gohsp_kernels._stamp import Stamp
from gohsp_kernels.testing import Maker, error, samples

from .test_chain import FEATURES, bound

needs_native = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
SIZES = (1, 2, 3, 15, 63, 127, 128, 129, 1000, 70001)


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "torch"], autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads the bytes: the native library, or PyTorch as on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(_stamp, "_native_checksum", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("size", SIZES)
def test_one_flipped_bit_is_noticed_wherever_it_is(size: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    stamp, raw = Stamp([tensor]), tensor.view(torch.uint8)
    assert stamp.is_of([tensor])
    for place in {0, 1 % len(raw), len(raw) // 2, len(raw) - 1}:
        for bit in (1, 128) if dtype != torch.bool else (1,):
            raw[place] ^= bit
            assert not stamp.is_of([tensor])
            raw[place] ^= bit
    assert stamp.is_of([tensor])
    if dtype != torch.bool:
        raw[: tensor.element_size()] ^= 255  # one word becomes its complement
        assert not stamp.is_of([tensor])


def test_a_scalar_is_read() -> None:
    tensor = torch.tensor(2.0, dtype=torch.float64)
    stamp = Stamp([tensor])
    tensor.neg_()
    assert not stamp.is_of([tensor])


def test_what_was_not_read_is_never_taken_as_true() -> None:
    """A form that is made in a capture, where nothing can be read, is made again after it."""
    tensor = torch.ones(3)
    with _stamp.trusting():
        stamp = Stamp([tensor])
        assert stamp.is_of([tensor])
    assert not stamp.is_of([tensor])


@pytest.mark.parametrize("size", [2, 128, 4096, 70001])
def test_changes_of_many_words_that_could_cancel_are_noticed(size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(1))
    stamp, before = Stamp([tensor]), tensor.clone()
    for change in (Tensor.neg, partial(torch.roll, shifts=1), partial(torch.flip, dims=(0,)), Tensor.zero_):
        tensor.copy_(change(tensor.clone()))
        assert not stamp.is_of([tensor])
        tensor.copy_(before)
        assert stamp.is_of([tensor])


def test_tensors_that_change_places_or_shape_are_noticed() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    stamp = Stamp([a, None, b])
    assert stamp.is_of([a, None, b])
    assert not stamp.is_of([b, None, a]) and not stamp.is_of([a, b, None]) and not stamp.is_of([a, None])
    assert not stamp.is_of([a.t(), None, b]) and not stamp.is_of([a, None, b.clone()])
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
    assert not stamp.is_of([a, None, b])


def test_constants_count() -> None:
    tensor = torch.ones(3)
    assert Stamp([tensor], (1, "gelu")).is_of([tensor], (1, "gelu"))
    assert not Stamp([tensor], (1, "gelu")).is_of([tensor], (1, "relu"))


def test_views_are_read_where_they_lie() -> None:
    whole = torch.randn(40, 40)
    view, empty = whole[3:7, 5::2], torch.empty(0, 4)
    stamp = Stamp([view, empty])
    whole[3, 5] += 1
    assert not stamp.is_of([view, empty])


@needs_native
def test_one_thread_and_several_read_the_same() -> None:
    tensors = [torch.randn(size) for size in (70001, 3, 200000)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        stamp = Stamp(tensors)
        torch.set_num_threads(3)
        assert all(stamp.is_of(tensors) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("name", ["packed_linear", "attention_sublayer", "mlp_sublayer"])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_operators_see_what_moves_no_version_counter(name: str, backend: str) -> None:
    call = samples()[name]
    call.run(backend)
    for tensor in call.tensors()[1:]:
        version = tensor._version
        tensor.data.mul_(1.5)
        assert tensor._version == version
        assert error(call.run(backend), call.truth()) < 2e-6


@needs_native
def test_weights_made_under_inference_mode_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from .test_packing import count_packings

    packings = count_packings(monkeypatch)
    with torch.inference_mode():
        call = samples()["mlp_sublayer"]
        call.run("cpu")
        first = len(packings)
        call.run("cpu")
        assert first > 0 and len(packings) == first
        call.operator.key.mul_(2)
        assert error(call.run("cpu"), call.truth()) < 2e-6


@needs_native
def test_a_call_under_fake_mode_gives_a_shape_and_leaves_nothing_behind() -> None:
    call = samples()["attention_sublayer"]
    wanted = call.truth()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(call.x)
        assert call.with_x(fake).run(None).shape == wanted.shape
        chain = gk.SublayerChain([bound(call)])
        assert chain(fake).shape == wanted.shape
    for result in (call.run("cpu"), chain(call.x)):
        assert type(result) is Tensor and error(result, wanted) < 2e-6


@needs_native
@pytest.mark.parametrize("name", ["packed_linear", "ragged_attention", "attention_sublayer", "mlp_sublayer"])
def test_tangents_flow_forwards(name: str) -> None:
    call = samples()[name].to(torch.float64)
    x = call.x
    direction = torch.randn_like(x)
    step = 1e-6
    wanted = (call.with_x(x + step * direction).run(None) - call.with_x(x - step * direction).run(None)) / (2 * step)
    call = call.to(torch.float32)
    with torch.no_grad(), forward_ad.dual_level():
        result = call.with_x(forward_ad.make_dual(x.float(), direction.float())).run(None)
        tangent = forward_ad.unpack_dual(result).tangent
    assert tangent is not None and error(tangent, wanted) < 1e-4


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("inferring", [1, 2, 4])
def test_training_beside_inference_leaves_nothing_stale(inferring: int) -> None:
    """A step between packing and the note of what was packed must show at the next call."""
    stale = 0
    for trial in range(34):
        maker = Maker(trial)
        calls = [maker.attention_sublayer(0, 0, FEATURES, [8, 8], [8, 8]), maker.mlp_sublayer((0,), FEATURES, 50)]
        weights = [nn.Parameter(call.operator.key, requires_grad=False) for call in calls]
        for call, weight in zip(calls, weights, strict=True):
            call.operator.key.set_(weight.data)
        chain, x = gk.SublayerChain(list(map(bound, calls))), maker.normal(1, 5, FEATURES)
        done = threading.Event()

        def infer(chain: gk.SublayerChain = chain, x: Tensor = x, done: threading.Event = done) -> None:
            while not done.is_set():
                chain(x, backend="cpu")

        threads = [threading.Thread(target=infer) for _ in range(inferring)]
        for thread in threads:
            thread.start()
        for step in range(30):
            for weight in weights:
                weight.data.mul_(1.01 if step % 2 else 0.98)
        done.set()
        for thread in threads:
            thread.join()
        wanted = x.double()
        for call in calls:
            wanted = call.to(torch.float64).with_x(wanted).run("reference")
        stale += error(chain(x, backend="cpu"), wanted) > 2e-6
    assert stale == 0


def test_a_block_of_one_thread_neither_reaches_nor_outlives_that_of_another() -> None:
    from gohsp_kernels import dispatch

    inside, release, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with gk.use_backend("reference"):
            inside.set()
            release.wait(10)
        seen.append(dispatch.selected())

    before = dispatch.selected()
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with gk.use_backend("cpu"):
        release.set()
        thread.join()
        assert dispatch.selected() == "cpu"
    assert dispatch.selected() == before and seen == [before]
