# SPDX-License-Identifier: Apache-2.0
"""Learned scores: gates by hand, budgets that hold, a training that helps, and a model that is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gohsp import count
from gohsp.models.base import OpenModel
from gohsp.models.registry import open_model
from gohsp.pruning import learned
from gohsp.pruning.budget import CELLS, Option, solve
from gohsp.pruning.calibration import embed
from gohsp.pruning.criteria import CRITERIA
from gohsp.pruning.prune import prune
from gohsp.pruning.sensitivity import Sensitivity, measure_sensitivities
from gohsp.pruning.typed_graph import TypedGraph, nodes_of, terms_of

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}  # heads of 16, 192 neurons
BOTH = ("learned", "learned-graph")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "STEPS", 5)


class Opened:
    """A small model with what the training of gates starts from."""

    def __init__(self, model: Any, batch: Tensor) -> None:
        self.opened: OpenModel = open_model(model)
        with torch.no_grad():
            self.stream, _ = embed(self.opened, [batch])
            self.sensitivities: list[Sensitivity] = measure_sensitivities(self.opened, self.stream)
            self.nodes = nodes_of(self.opened, self.sensitivities)
            self.choices = learned._choices(self.opened, self.nodes)
            self.means = learned._means(self.opened, self.stream)
        self.start = terms_of(self.nodes, self.sensitivities)

    def limit(self, room: float) -> float:
        least, whole = (sum(pick(option.cost for option in options) for options in self.choices) for pick in (min, max))
        return least + room * (whole - least)

    def gates(self, prices: Tensor, room: float, temperature: float) -> list[Tensor]:
        return learned._gates(prices, self.nodes, self.choices, self.limit(room), temperature)

    def error(self, gates: list[Tensor]) -> float:
        with torch.no_grad():
            wanted = learned._features(self.opened, self.stream)
            with learned._gated(self.opened, gates, self.means):
                return (learned._features(self.opened, self.stream) - wanted).square().mean().item()


@pytest.fixture
def made(make_model, images) -> Opened:
    return Opened(make_model(**SMALL, init_values=0.7), images(16, 32))


def test_options_cost_what_a_block_without_them_has(made: Opened) -> None:
    dense = count(made.opened.model).blocks
    for index, options in enumerate(made.choices):
        half = ("attn_params", "mlp_params")[index % 2]
        assert options[0].cost == getattr(dense[index // 2], half)
    assert [len(options) for options in made.choices] == [3, 12] * 2
    tile, head = 16 * (2 * 48 + 1), 16 * 4 * 48 + 3 * 16
    assert {before.cost - after.cost for before, after in zip(made.choices[1], made.choices[1][1:], strict=False)} == {
        tile
    }
    assert {before.cost - after.cost for before, after in zip(made.choices[0], made.choices[0][1:], strict=False)} == {
        head
    }


def test_cold_gates_are_the_exact_solution_at_these_prices(made: Opened, monkeypatch) -> None:
    """In the order of the prices, the cheapest nodes of a sublayer closed, all columns of a node alike."""
    monkeypatch.setattr(learned, "CELLS", CELLS)
    prices = torch.rand(len(made.start), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = prices.split([len(of) for of in made.nodes])
    options = [
        [Option(option.cost, float(of.sort().values[:gone].sum()), {}) for gone, option in enumerate(choice)]
        for of, choice in zip(own, made.choices, strict=True)
    ]
    picks = solve(options, made.limit(0.5))
    assert min(picks[1::2]) > 0
    for gates, of, nodes, pick in zip(made.gates(prices, 0.5, 1e-5), own, made.nodes, picks, strict=True):
        for place, node in enumerate(of.argsort().tolist()):
            wanted = torch.full((16,), float(place >= pick), dtype=torch.float64)
            torch.testing.assert_close(gates[nodes[node]], wanted)


@pytest.mark.parametrize("room", [0.2, 0.5, 0.8])
def test_gates_hold_the_budget_on_average(made: Opened, room: float) -> None:
    found = made.gates(made.start, room, float(made.start.median()))
    tile, head = 16 * (2 * 48 + 1), 16 * 4 * 48 + 3 * 16
    closed = sum(float((1 - gates).sum()) / 16 * (head, tile)[index % 2] for index, gates in enumerate(found))
    whole = sum(options[0].cost for options in made.choices)
    assert whole - closed <= made.limit(room) * (1 + 1e-9)
    assert all(gates.min() >= 0 and gates.max() <= 1 + 1e-9 for gates in found)
    assert all(
        gates[nodes[int(of.argmax())]].min().item() == pytest.approx(1)
        for gates, nodes, of in zip(found, made.nodes, made.start.split([len(of) for of in made.nodes]), strict=True)
    )


def test_open_gates_change_nothing_and_closed_ones_leave_the_mean(made: Opened) -> None:
    gates = [torch.ones(layer.write.in_features, dtype=torch.float64) for layer in made.opened.sublayers]
    assert made.error(gates) < 1e-25
    gates[3][:100] = 0
    model = copy.deepcopy(made.opened.model)
    fc2 = model.blocks[1].mlp.fc2
    with torch.no_grad():
        fc2.bias += fc2.weight[:, :100] @ made.means[3][:100]
        fc2.weight[:, :100] = 0
        with learned._gated(made.opened, gates, made.means):
            got = learned._features(made.opened, made.stream)
        torch.testing.assert_close(got, learned._features(open_model(model), made.stream))
        assert not any(module._forward_pre_hooks for module in made.opened.model.modules())


def test_the_means_are_those_of_all_tokens(made: Opened) -> None:
    hidden, x = [], made.stream
    for layer in made.opened.sublayers:
        trace = layer.trace(x)
        x = trace.after
        hidden.append(trace.hidden.flatten(0, 1).mean(dim=0))
    for mean, wanted in zip(made.means, hidden, strict=True):
        torch.testing.assert_close(mean, wanted)


@pytest.mark.parametrize("method", BOTH)
def test_a_training_lowers_the_error_of_what_is_picked(made: Opened, monkeypatch, method: str) -> None:
    monkeypatch.setattr(learned, "STEPS", 60)
    with torch.no_grad():
        found = CRITERIA[method].survey(made.opened, made.stream, made.sensitivities, 0)
    assert found is not None
    trained = torch.cat(
        [torch.stack([of[node].sum() for node in nodes]) for of, nodes in zip(found, made.nodes, strict=True)]
    )
    cold = 1e-3 * float(made.start.median())
    before, after = (
        sum(made.error(made.gates(prices, room, cold)) for room in (0.3, 0.5, 0.7)) for prices in (made.start, trained)
    )
    assert after < 0.97 * before


@pytest.mark.parametrize("method", BOTH)
def test_before_the_first_step_prices_are_the_first_order_terms(made: Opened, monkeypatch, method: str) -> None:
    monkeypatch.setattr(learned, "STEPS", 0)
    with torch.no_grad():
        found = CRITERIA[method].survey(made.opened, made.stream, made.sensitivities, 0)
    assert found is not None
    for prices, sensitivity in zip(found, made.sensitivities, strict=True):
        torch.testing.assert_close(prices, sensitivity.taylor)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", BOTH)
def test_the_model_its_gradients_and_the_global_generator_stay_as_they_were(make_model, images, method: str) -> None:
    model, batch = make_model(**SMALL).train(), images(12, 32)
    model(batch).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    chance = torch.get_rng_state()
    prune(model, [batch], {"params": 0.7}, method)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, wanted) for p, wanted in zip(model.parameters(), gradients, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", BOTH)
def test_the_seed_decides(made: Opened, method: str) -> None:
    def found(seed: int) -> Tensor:
        with torch.no_grad():
            prices = CRITERIA[method].survey(made.opened, made.stream, made.sensitivities, seed)
        assert prices is not None
        return torch.cat(prices)

    torch.manual_seed(1)
    first = found(0)
    torch.manual_seed(2)
    assert torch.equal(found(0), first)
    assert not torch.equal(found(1), first)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", BOTH)
def test_in_inference_mode_and_float32(make_model, images, method: str) -> None:
    model, batch = make_model(**SMALL).float(), images(12, 32)
    wanted = prune(model, [batch], {"params": 0.6}, method)
    with torch.inference_mode():
        got = prune(model, [batch], {"params": 0.6}, method)
    assert got.mask.blocks == wanted.mask.blocks


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", BOTH)
def test_one_image_is_enough_to_run(make_model, images, method: str) -> None:
    model = make_model(**SMALL).float()
    with torch.no_grad():
        model.norm.weight.mul_(1e6)  # errors over a variance of nothing would leave float32
    result = prune(model, [images(1, 32)], {"params": 0.6}, method)
    assert result.report.pruned.params <= 0.6 * result.report.dense.params
    with torch.no_grad():
        opened = open_model(model)
        stream, _ = embed(opened, [images(1, 32).float()])
        found = CRITERIA[method].survey(opened, stream, measure_sensitivities(opened, stream), 0)
    assert found is not None and all(bool(torch.isfinite(prices).all()) for prices in found)


def test_the_scorer_mixes_what_is_known_with_the_neighbours(made: Opened, monkeypatch) -> None:
    """A node without neighbours keeps its own; of two with an edge each way, each gets two thirds of the other's."""

    def basis(edges: Tensor) -> Tensor:
        monkeypatch.setattr(TypedGraph, "edges", lambda _: edges)
        with torch.no_grad():
            return learned._convolved(made.opened, made.stream, made.sensitivities, made.start.log())

    edges = torch.zeros(len(made.start), len(made.start), dtype=torch.float64)
    alone = basis(edges)
    torch.testing.assert_close(alone.mean(dim=0), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(alone.std(dim=0), torch.ones(5, dtype=torch.float64))
    edges[4, 7] = edges[7, 4] = 1
    together = basis(edges)
    monkeypatch.undo()
    same = [node for node in range(len(edges)) if node not in (4, 7)]
    # The ranks follow the edges as well; what does not is the terms, and where a node stands.
    torch.testing.assert_close(together[same][:, [0, 3, 4]], alone[same][:, [0, 3, 4]])
    wanted = (alone[4] + 2 * alone[7]) / 3
    torch.testing.assert_close(together[4][[0, 3, 4]], wanted[[0, 3, 4]])


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", ["graph", "graph-relearnt", *BOTH])
@pytest.mark.parametrize("arguments", [{"num_heads": 1, "mlp_ratio": 0.75}, {"mlp_ratio": 0.75, "qk_norm": True}])
def test_blocks_with_one_head_or_an_odd_rest_of_neurons(make_model, images, method: str, arguments) -> None:
    model = make_model(**(SMALL | arguments))
    result = prune(model, [images(4, 32)], {"params": 0.95}, method)
    assert result.report.pruned.params <= 0.95 * result.report.dense.params
    assert all(budget.hidden in (16, 32, 36) for budget in result.report.budgets)
