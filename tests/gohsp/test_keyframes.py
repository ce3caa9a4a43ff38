# SPDX-License-Identifier: Apache-2.0
"""A dense model on key frames and a pruned one in between: what each frame gives, and what the state fits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gohsp


class Counted(nn.Module):
    """Multiplies the mean of a frame, and counts its calls."""

    def __init__(self, factor: float, width: int = 2) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.width, self.calls = width, 0

    def forward(self, frames: Tensor) -> Any:
        self.calls += 1
        return self.factor * frames.flatten(1).mean(dim=1, keepdim=True).expand(-1, self.width)


def pair(every: int = 4) -> tuple[Counted, Counted, gohsp.KeyframeModel]:
    dense, pruned = Counted(3.0).eval(), Counted(2.0).eval()
    return dense, pruned, gohsp.KeyframeModel(dense, pruned, every=every)


def frame(value: float, streams: int = 1, size: int = 4, **kind: Any) -> Tensor:
    return torch.full((streams, 3, size, size), value, **kind)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_the_difference_of_the_last_key_frame_is_added(every: int) -> None:
    dense, pruned, model = pair(every)
    for t in range(3 * every + 1):
        at_key = float(t - t % every)
        wanted = 3.0 * t if t % every == 0 else 2.0 * t + at_key
        assert torch.equal(model(frame(float(t))), torch.full((1, 2), wanted))
    assert (dense.calls, pruned.calls) == (4, 3 * every + 1)


def test_every_frame_a_key_frame_is_the_dense_model_alone() -> None:
    dense, pruned, model = pair(1)
    assert [float(model(frame(t))[0, 0]) for t in (1.0, 2.0)] == [3.0, 6.0]
    assert (dense.calls, pruned.calls) == (2, 0)


def test_each_stream_has_its_own_difference() -> None:
    model = pair()[2]
    both = torch.cat([frame(1.0), frame(5.0)])
    assert model(both)[:, 0].tolist() == [3.0, 15.0]
    assert model(both + 1)[:, 0].tolist() == [2 * 2.0 + 1.0, 2 * 6.0 + 5.0]


def test_after_a_reset_comes_a_key_frame() -> None:
    dense, _, model = pair()
    model(frame(1.0))
    model.reset()
    assert float(model(frame(2.0))[0, 0]) == 6.0
    assert dense.calls == 2


@pytest.mark.parametrize(
    "other", [{"streams": 2}, {"size": 5}, {"dtype": torch.float64}, {"device": "meta"}], ids=lambda o: next(iter(o))
)
def test_a_batch_that_the_state_does_not_fit_is_a_key_frame(other: dict[str, Any]) -> None:
    dense, pruned, model = pair()
    model(frame(1.0))
    if "device" in other:
        model.to("meta")
    wanted = dense(frame(2.0, **other))
    got = model(frame(2.0, **other))
    assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.device == wanted.device
    assert got.is_meta or torch.equal(got, wanted)
    assert (dense.calls, pruned.calls) == (3, 2)


def test_under_autocast_the_state_of_another_dtype_is_not_added() -> None:
    dense, pruned = nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval()
    model, x = gohsp.KeyframeModel(dense, pruned), torch.randn(1, 3)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), dense(x)) and model(x).dtype == torch.bfloat16


def test_the_models_are_held_and_the_state_is_not_saved() -> None:
    dense, pruned, model = pair()
    names = set(model.state_dict())
    model(frame(1.0))
    assert set(model.state_dict()) == names == {"dense.factor", "pruned.factor"}
    assert model.dense is dense and model.pruned is pruned
    twin = copy.deepcopy(model)
    twin.reset()
    assert float(model(frame(2.0))[0, 0]) == 5.0  # whatever became of a copy
    assert "every=4" in repr(model)


def test_training_is_refused_and_nothing_records_gradients() -> None:
    dense, pruned, model = pair()
    assert not model.training and not model(frame(1.0)).requires_grad and not model(frame(1.0)).requires_grad
    message = "KeyframeModel: wanted evaluation mode, for it is made for inference; call eval"
    for one in (dense, pruned, model):
        one.train()
        with pytest.raises(RuntimeError, match=message):
            model(frame(1.0))
        model.eval()
    dense.train()
    fresh = gohsp.KeyframeModel(dense, pruned)
    assert fresh.training and dense.training and not pruned.training  # nobody's mode was changed
    fresh.eval()(frame(1.0))
    assert not dense.training


def test_a_state_from_inference_mode_serves_outside_of_it() -> None:
    model = pair()[2]
    with torch.inference_mode():
        model(frame(1.0))
    assert float(model(frame(2.0))[0, 0]) == 5.0


class Tuples(Counted):
    def forward(self, frames: Tensor) -> Any:
        return (super().forward(frames),)


@pytest.mark.parametrize(
    ("dense", "pruned", "error", "message"),
    [
        (
            Counted(1.0, 3),
            Counted(1.0, 2),
            ValueError,
            r"pruned: wanted the shape .* gives, \(1, 3\), got \(1, 2\)",
        ),
        (Counted(1.0), Tuples(1.0), TypeError, "pruned: wanted a module that gives a tensor, got tuple"),
        (Tuples(1.0), Counted(1.0), TypeError, "dense: wanted a module that gives a tensor, got tuple"),
    ],
)
def test_models_that_do_not_go_together_are_refused_at_each_call(dense, pruned, error, message: str) -> None:
    model = gohsp.KeyframeModel(dense, pruned).eval()
    for _ in range(2):
        with pytest.raises(error, match=message):
            model(frame(1.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dense": 1}, TypeError, "dense: wanted a module, got int"),
        ({"pruned": None}, TypeError, "pruned: wanted a module, got NoneType"),
        ({"every": 0}, ValueError, "every: wanted a whole number from 1 up, got 0"),
        ({"every": 2.0}, TypeError, "every: wanted a whole number, got float"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        gohsp.KeyframeModel(**({"dense": nn.Identity(), "pruned": nn.Identity(), "every": 2} | arguments))


def test_a_pruned_transformer_follows_its_dense_one(make_model, images) -> None:
    """All tokens of a real pair: exact on key frames, and as near as the difference is steady in between."""
    dense = make_model(num_classes=0, global_pool="").float()
    mask = gohsp.ModelMask.random(dense, 0.7, torch.Generator().manual_seed(0))
    pruned = gohsp.freeze(gohsp.compress(dense, mask))
    model = gohsp.KeyframeModel(dense, pruned, every=2)
    first = images(2).float()
    second = first + 0.01 * images(2, seed=1).float()
    with torch.inference_mode():
        assert torch.equal(model(first), dense(first))
        wanted = dense(second)
        carried, alone = (model(second) - wanted).norm(), (pruned(second) - wanted).norm()
    assert carried < 0.2 * alone
