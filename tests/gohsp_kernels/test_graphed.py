# SPDX-License-Identifier: Apache-2.0
"""GraphedModel, with a stand-in for CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import gohsp_kernels as gk
from gohsp_kernels import graphed
from gohsp_kernels.testing import Maker
from gohsp_kernels.triton import operators
from tests.gohsp_kernels.graph_stand_in import StandIn, stand_in


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return stand_in(monkeypatch)


class Sublayers(nn.Module):
    """A block whose heads and columns are pruned, on its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.sublayers = [
            Maker(1).attention_sublayer(2, 9, 24, [8, 0, 5], [8, 3, 16], 17, 20),
            Maker(2).mlp_sublayer((2, 9), 24, 40, 17, 20),
        ]
        tensors = (tensor for call in self.sublayers for tensor in call.tensors()[1:])
        self.weights = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for call in self.sublayers:
            x = call.bound()(x)
        return x


def images(batch: int, seed: int = 0) -> Tensor:
    return Maker(seed).normal(batch, 9, 24)


@pytest.fixture
def model() -> Iterator[Sublayers]:
    with gk.use_backend("triton"):
        yield Sublayers().eval()


@pytest.mark.interpreter
def test_a_replay_gives_what_the_model_gives(captures: list[StandIn], model: Sublayers) -> None:
    fast = gk.GraphedModel(model)
    results = [fast(images(2, seed)) for seed in range(3)]
    assert len(captures) == 1 and model.calls == graphed.WARM_UP + 1
    for seed, result in enumerate(results):
        assert torch.equal(result, model(images(2, seed)))


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_capture_holds_launches_and_room_for_their_results(captures: list[StandIn], model: Sublayers) -> None:
    """No packing, no table of heads, no copy: five launches, the room for each result, and nothing else."""
    gk.GraphedModel(model)(images(2))
    assert len(captures[0].operations) == 10


@pytest.mark.slow
@pytest.mark.interpreter
def test_each_shape_has_its_graph_up_to_a_limit(captures: list[StandIn], model: Sublayers) -> None:
    fast = gk.GraphedModel(model, max_shapes=2)
    for batch in (1, 3, 1, 3):
        assert torch.equal(fast(images(batch)), model(images(batch)))
    assert len(captures) == 2
    with pytest.raises(RuntimeError, match=r"max_shapes=2 shapes, .* \[1, 9, 24\], \[3, 9, 24\]; got \[2, 9, 24\]"):
        fast(images(2))
    assert torch.equal(fast(images(3)), model(images(3)))


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_changed_parameter_is_noticed(captures: list[StandIn], model: Sublayers) -> None:
    fast = gk.GraphedModel(model, max_shapes=1)
    before = fast(images(2))
    model.weights[2].mul_(2)
    after = fast(images(2))
    assert len(captures) == 2 and not torch.equal(after, before)
    assert torch.equal(after, model(images(2)))


def test_a_parameter_that_is_exchanged_or_changed_unseen_is_noticed(captures: list[StandIn]) -> None:
    linear, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    fast = gk.GraphedModel(linear, max_shapes=1)
    fast(x)
    linear.load_state_dict({k: v * 2 for k, v in linear.state_dict().items()}, assign=True)
    assert torch.equal(fast(x), linear(x)) and len(captures) == 2
    linear.weight.data.mul_(2)
    assert torch.equal(fast(x), linear(x)) and len(captures) == 3
    assert torch.equal(fast(x), linear(x)) and len(captures) == 3


def test_the_gpu_is_started_before_the_host_looks_at_the_weights(
    captures: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: what Python does until then does not grow with them."""

    def calls_until_replay(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(4, 4, bias=i % 2 == 0) for i in range(layers))).eval()
        fast, x, called = gk.GraphedModel(model), torch.randn(2, 4), []
        fast(x)

        class Begun(Exception):
            pass

        def replay(graph: StandIn) -> None:
            raise Begun

        def note(frame: object, event: str, argument: object) -> None:
            called.append(event)

        with monkeypatch.context() as patch:
            patch.setattr(StandIn, "replay", replay)
            sys.setprofile(note)
            try:
                with contextlib.suppress(Begun):
                    fast(x)
            finally:
                sys.setprofile(None)
        return len(called)

    assert 10 < calls_until_replay(2) == calls_until_replay(80) < 150


@pytest.mark.parametrize("change", ["strides", "shape", "dtype", "storage", "gone", "there"])
def test_weights_that_lie_otherwise_are_noticed(change: str, captures: list[StandIn]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.eye(4)), None
            self.register_parameter("bias", nn.Parameter(torch.zeros(4)))
            self.register_parameter("extra", None)

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.weight.reshape(4, -1)[:, :4].to(x.dtype)
            return x if self.extra is None else x + self.extra

    model, x = Scaled().eval(), torch.randn(2, 4)
    fast = gk.GraphedModel(model, max_shapes=1)
    fast(x)
    data = model.weight.data
    if change == "strides":
        data[0, 1] = 2
        fast(x)
        model.weight.data = data.t()
    elif change == "shape":
        model.weight.data = data.view(2, 8)
    elif change == "dtype":
        model.weight.data = data.half()
        fast(x)
        model.weight.data = model.weight.data.view(torch.bfloat16)
    elif change == "storage":
        model.weight.data = data.clone()
    elif change == "gone":
        model.bias = None
    else:
        model.extra = nn.Parameter(torch.ones(4))
    before = len(captures)
    assert torch.equal(fast(x), model(x).detach()) and len(captures) == before + 1
    assert torch.equal(fast(x), model(x).detach()) and len(captures) == before + 1


@pytest.mark.slow
@pytest.mark.interpreter
def test_packed_weights_outlive_their_place_in_the_cache(captures: list[StandIn], model: Sublayers) -> None:
    fast, x = gk.GraphedModel(model), images(2)
    result = fast(x)
    key = model.sublayers[1].operator.key
    packed = weakref.ref(operators._cache._entries[key][1].fc1.weight)
    model(x.half())  # packs anew, in the same place
    gc.collect()
    assert packed() is not None
    assert torch.equal(fast(x), result)
    del fast
    captures.clear()
    gc.collect()
    assert packed() is None


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_backend_belongs_to_the_graph(captures: list[StandIn], model: Sublayers) -> None:
    fast = gk.GraphedModel(model)
    fast(images(2))
    with gk.use_backend("reference"):
        assert torch.equal(fast(images(2)), model(images(2)))
    assert len(captures) == 2


@pytest.mark.usefixtures("captures")
def test_results_do_not_share_memory_and_have_no_gradient() -> None:
    fast = gk.GraphedModel(nn.Linear(4, 3).eval())
    x = torch.randn(2, 4, requires_grad=True)
    first = fast(x)
    copy = first.clone()
    fast(x * 2)
    assert torch.equal(first, copy) and not first.requires_grad and not first.is_inference()


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="x: wanted a tensor on cuda, as only a GPU has graphs; got one on cpu"):
        gk.GraphedModel(nn.Linear(4, 3).eval())(torch.randn(2, 4))


@pytest.mark.usefixtures("captures")
def test_what_cannot_be_graphed_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module; got function"):
        gk.GraphedModel(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"model: wanted evaluation mode, .* call model\.eval\(\)"):
        gk.GraphedModel(nn.Linear(4, 3))(torch.randn(2, 4))
    with pytest.raises(TypeError, match="model: wanted one that gives a tensor; got tuple"):
        gk.GraphedModel(nn.LSTM(4, 3).eval())(torch.randn(2, 4))
