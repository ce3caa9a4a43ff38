# SPDX-License-Identifier: Apache-2.0
"""Heads in their principal axes: the same function, the best basis, and what pruning gains by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gohsp
from gohsp.models.registry import open_model
from gohsp.pruning import axes
from gohsp.pruning.axes import axes_of, principal_axes
from gohsp.pruning.calibration import embed
from gohsp.pruning.prune import prune
from gohsp.pruning.ranking import SIMILARITIES, rank_heads
from gohsp.pruning.scoring import AXES, QKMoments
from gohsp.pruning.sensitivity import measure_sensitivities

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}  # heads of 16, 5 tokens
CHANNELS = ("heads", "hidden", "qk", "v")

KINDS = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    ("vit_tiny_patch16_224", {"qk_norm": True}),
    ("vit_tiny_patch16_224", {"init_values": 1e-5}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"num_heads": 4}),  # of 12
    ("vit_tiny_patch16_224", {"num_heads": 1}),
    ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0, "reg_tokens": 2}),
    ("deit_tiny_distilled_patch16_224", {}),
]


def attentions(model: Any) -> list[Any]:
    return [block.attention for block in open_model(model).blocks]


def rows(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the weights of q, k and v of each block."""
    return [tuple(layer.read.weight.chunk(3)) for layer in attentions(model)]


def same_weights(first: Any, second: Any) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(*shape: int, seed: int = 0) -> Tensor:
    root = normal(*shape, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_the_function_stays(make_model, images, relative_error, name: str, arguments: dict[str, Any]) -> None:
    model, batch, fresh = make_model(name, **SMALL | arguments), images(16, 32), images(4, 32, seed=5)
    turned = principal_axes(model, [batch])
    assert type(turned) is type(model)
    assert relative_error(turned(fresh), model(fresh)) < 1e-10
    single = principal_axes(copy.deepcopy(model).float(), [batch.float()])
    assert all(value.dtype == torch.float32 for value in single.state_dict().values())
    assert relative_error(single.double()(fresh), copy.deepcopy(model).float().double()(fresh)) < 2e-6
    for (q, k, v), given in zip(rows(turned), rows(model), strict=True):
        left_alone = bool(arguments.get("qk_norm"))
        assert torch.equal(q, given[0]) is torch.equal(k, given[1]) is left_alone
        assert not torch.equal(v, given[2])


@pytest.mark.parametrize("groups", [("qk",), ("v",)])
def test_only_what_is_named_is_turned(make_model, images, groups: tuple[str, ...]) -> None:
    model = make_model(**SMALL)
    turned = principal_axes(model, [images(16, 32)], groups=groups)
    for (q, k, v), (q0, k0, v0) in zip(rows(turned), rows(model), strict=True):
        assert torch.equal(q, q0) is torch.equal(k, k0) is ("qk" not in groups)
        assert torch.equal(v, v0) is ("v" not in groups)
    for layer, given in zip(attentions(turned), attentions(model), strict=True):
        assert torch.equal(layer.write.weight, given.write.weight) is ("v" not in groups)


def test_the_given_model_and_its_mode_stay_as_they_were(make_model, images) -> None:
    model = make_model(**SMALL, drop_path_rate=0.3).train()
    model.blocks[0].eval()
    modes, before = [module.training for module in model.modules()], copy.deepcopy(model)
    with torch.inference_mode():
        turned = principal_axes(model, [images(16, 32)])
        result = prune(model, [images(16, 32)], {"params": 0.7}, groups=CHANNELS)
    assert same_weights(model, before)
    for each in (model, turned, result.model):
        assert [module.training for module in each.modules()] == modes
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in each.modules())
    assert not any(parameter.is_inference() or parameter.grad is not None for parameter in turned.parameters())


def test_axes_are_uncorrelated_sorted_and_cost_the_same() -> None:
    held, cost = moments(2, 6, 9), moments(2, 6, 9, seed=1)
    turn, back, energies = axes_of(held, cost)
    unit = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(turn @ back, unit.expand(2, 6, 6), rtol=1e-10, atol=1e-10)
    level = cost.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    torch.testing.assert_close(
        back.mT @ cost @ back / level, unit.expand(2, 6, 6), rtol=0, atol=0.05
    )  # but for damping
    after = turn @ held @ turn.mT
    torch.testing.assert_close(after * level, torch.diag_embed(energies), rtol=1e-9, atol=1e-9)
    assert bool((energies.diff(dim=1) <= 0).all())


def test_no_other_channels_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of q in any basis, found by an optimiser that starts from many places."""
    monkeypatch.setattr(axes, "DAMPING", 1e-12)
    held, cost = moments(5, 9), moments(5, 9, seed=1)
    *_, energies = axes_of(held, cost)
    best = min(_least_loss(held, cost, 2, seed) for seed in range(3))
    assert best == pytest.approx(float(energies[2:].sum()), rel=1e-4)


def _least_loss(held: Tensor, cost: Tensor, rank: int, seed: int) -> float:
    down, up = normal(rank, 5, seed=seed + 2).requires_grad_(), normal(5, rank, seed=seed + 9).requires_grad_()
    unit = torch.eye(5, dtype=torch.float64)

    def loss() -> Tensor:
        error = unit - up @ down
        return (cost * (error @ held @ error.T)).sum()

    optimiser = torch.optim.LBFGS([down, up], max_iter=500, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(step)
    return float(loss().detach())


@pytest.mark.parametrize("held", ["full", "thin", "none"])
@pytest.mark.parametrize("cost", ["full", "thin", "none", "tiny"])
def test_singular_moments_give_a_basis_all_the_same(held: str, cost: str) -> None:
    kinds = {"full": moments(6, 9), "thin": moments(6, 2, seed=1), "none": torch.zeros(6, 6).double()}
    turn, back, energies = axes_of(kinds[held], (kinds | {"tiny": 1e-200 * moments(6, 9)})[cost])
    torch.testing.assert_close(turn @ back, torch.eye(6).double(), rtol=1e-10, atol=1e-10)
    assert torch.linalg.cond(turn) < 1e4
    assert bool(torch.isfinite(energies).all()) and bool((energies >= 0).all())


def test_heads_without_weights_with_constant_keys_or_few_tokens(make_model, images, relative_error) -> None:
    model = make_model(**SMALL, init_values=0.3)
    with torch.no_grad():
        for index, attention in enumerate(attentions(model)):
            read, write = attention.read.layers[0], attention.write.layers[0]
            by_head = read.weight.view(3, 3, 16, 48), read.bias.view(3, 3, 16)
            by_head[0][:, 0] = 0  # a head with biases alone
            by_head[1][:, 0] = index
            by_head[0][1, 1] = 0  # constant keys
            write.weight[:, 32:] = 0  # a head that is not read
    turned = principal_axes(model, [images(1, 32)])  # 5 tokens for 16 channels
    fresh = images(4, 32, seed=5)
    assert relative_error(turned(fresh), model(fresh)) < 1e-10
    result = prune(model, [images(1, 32)], {"params": 0.6}, groups=CHANNELS)
    assert all(bool(torch.isfinite(value).all()) for value in result.model.state_dict().values())


def test_gradients_by_queries_are_autograds(make_model, images) -> None:
    model = make_model(**SMALL)
    opened = open_model(model)
    stream, _ = embed(opened, [images(1, 32)])
    layer = opened.blocks[1].attention
    caught: list[Tensor] = []
    handle = layer.read.layers[0].register_forward_hook(lambda _, __, output: caught.append(output))
    x = stream
    for each in opened.sublayers:
        x = each(x)
    handle.remove()
    features = opened.features(x)
    signs = torch.randint(0, 2, features.shape, generator=torch.Generator().manual_seed(7)).mul(2).sub(1)
    (gradient,) = torch.autograd.grad((features * signs).sum(), caught)
    wanted = torch.stack([part.T @ part for part in gradient[0, :, :48].split(16, dim=1)])
    got = measure_sensitivities(opened, stream, seed=7)
    torch.testing.assert_close(got[2].queries, wanted, rtol=1e-8, atol=1e-12)
    assert got[3].queries.numel() == 0


def test_costs_of_queries_are_what_the_axes_are_sorted_by(make_model, images) -> None:
    """Measured on the turned model; the first channels of each head are the dear ones."""
    turned = principal_axes(make_model(**SMALL), [images(24, 32)])
    opened = open_model(turned)
    with torch.no_grad():
        stream, _ = embed(opened, [images(24, 32)])
        found = measure_sensitivities(opened, stream)[0]
        layer = opened.blocks[0].attention
        gathered = QKMoments(layer, found.weights(), turned=True)
        gathered.add(*gathered.sums(layer.trace(stream)))
        costs = gathered.statistics(found, torch.Generator()).energy
        q, _, _ = layer.split(layer.read(layer.norm(stream)))
    weights = found.weights() / found.weights().sum() / len(stream)
    held = torch.einsum("n,bhnc,bhnd->hcd", weights, q, q)
    torch.testing.assert_close(costs, (held * found.queries).diagonal(dim1=1, dim2=2), rtol=1e-9, atol=1e-12)
    off = held - torch.diag_embed(held.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-9 * held.abs().max()
    assert bool((costs.diff(dim=1) < 1e-3 * costs[:, :1]).all())


def test_outputs_are_uncorrelated_and_cost_the_same(make_model, images) -> None:
    opened = open_model(principal_axes(make_model(**SMALL), [images(24, 32)], seed=3))
    with torch.no_grad():
        stream, _ = embed(opened, [images(24, 32)])
        found, layer = measure_sensitivities(opened, stream, seed=3)[0], opened.blocks[0].attention
        outputs = layer.trace(stream).hidden
    held = torch.cov(outputs.flatten(0, 1).T, correction=0, aweights=found.weights().expand(24, -1).flatten())
    cost = layer.written().T @ found.metric @ layer.written()
    for head in range(3):
        mine = slice(16 * head, 16 * head + 16)
        own, level = held[mine, mine], cost[mine, mine].diagonal().mean()
        assert (own - torch.diag(own.diagonal())).abs().max() < 1e-8 * own.max()
        assert bool((own.diagonal().diff() <= 0).all())
        torch.testing.assert_close(cost[mine, mine] / level, torch.eye(16).double(), rtol=0, atol=0.05)


def test_rows_of_q_and_k_are_equally_long(make_model, images) -> None:
    for q, k, _ in rows(principal_axes(make_model(**SMALL), [images(16, 32)])):
        torch.testing.assert_close(q.norm(dim=1), k.norm(dim=1))


def with_few_directions(model: Any, rank: int = 5) -> Any:
    """Give the heads scores and values of low rank but for noise, in bases that hide it, as training leaves them."""
    with torch.no_grad():
        for index, layer in enumerate(attentions(model)):
            read, write = layer.read.layers[0], layer.write.layers[0]
            heads = read.weight.view(3, 3, 16, 48)
            for kind, head in ((kind, head) for kind in range(3) for head in range(3)):
                seed = 100 * index + 10 * kind + head
                weak = torch.cat((torch.ones(rank), torch.full((16 - rank,), 0.03))).double()
                heads[kind, head] = normal(16, 16, seed=seed) @ (weak[:, None] * heads[kind, head])
            read.bias.zero_()
            write.weight.mul_(0.5)
    return model


@pytest.mark.parametrize("group", ["qk", "v"])
def test_pruned_channels_cost_less_in_principal_axes(make_model, images, group: str) -> None:
    model, batches = with_few_directions(make_model(**SMALL)), list(images(64, 32).split(32))
    whole = prune(model, batches, {"params": 1.0}).report.budgets
    half = [gohsp.pruning.budget.BlockBudget(**{**vars(budget), group: 24}) for budget in whole]  # 8 of 16 a head
    given, principal = (
        prune(model, batches, budgets=half, groups=(group,), axes=name) for name in ("given", "principal")
    )
    assert principal.report.pruned == given.report.pruned
    assert principal.report.errors[-1] < 0.3 * given.report.errors[-1]
    fresh = images(16, 32, seed=5)
    with torch.no_grad():
        gaps = [(found.model(fresh) - model(fresh)).norm() for found in (principal, given)]
    assert gaps[0] < 0.6 * gaps[1]


def test_the_mask_means_the_turned_model(make_model, images, relative_error, tmp_path: Path) -> None:
    """With weights that are left alone, mask and turned model are all there is, and files hold what was turned."""
    model, batches = make_model(**SMALL).float(), [images(24, 32).float()]
    result = prune(model, batches, {"params": 0.7}, groups=CHANNELS, optimiser="drop")
    assert result.report.turned == ("qk", "v")
    masked = result.mask.apply_(principal_axes(model, batches))
    fresh = images(4, 32, seed=5).float()
    assert relative_error(masked(fresh), result.model(fresh)) < 1e-5
    assert relative_error(result.mask.apply_(copy.deepcopy(model))(fresh), result.model(fresh)) > 0.1
    compact = gohsp.compress(result.model, result.mask).eval()
    assert relative_error(compact(fresh), result.model(fresh)) < 1e-6
    gohsp.save(compact, tmp_path / "pruned")
    assert torch.equal(gohsp.load(tmp_path / "pruned")(fresh), compact(fresh))


def test_without_channels_nothing_is_turned(make_model, images) -> None:
    model, seen = make_model(**SMALL), []
    found = [
        prune(
            *(model, [images(24, 32)], {"params": 0.6}),
            **{"groups": ("heads", "hidden"), "axes": name, "on_progress": lambda *s: seen.append(s)},
        )
        for name in AXES
    ]
    assert same_weights(found[0].model, found[1].model) and found[0].mask.blocks == found[1].mask.blocks
    assert seen[-1] == (9, 9) and found[0].report.turned == ()
    kept = prune(model, [images(24, 32)], {"params": 1.0}, groups=("heads", "hidden"))
    assert all(torch.equal(a, b) for a, b in zip(sum(rows(kept.model), ()), sum(rows(model), ()), strict=True))


def test_progress_is_told_to_the_end(make_model, images) -> None:
    seen: list[tuple[int, int]] = []
    prune(
        make_model(**SMALL), [images(24, 32)], {"params": 0.7}, groups=CHANNELS, on_progress=lambda *s: seen.append(s)
    )
    assert seen == [(step, 12) for step in range(1, 13)]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_heads_are_ranked_as_they_were_given(make_model, images, similarity: str) -> None:
    model, batches = make_model(**SMALL), list(images(24, 32).split(8))
    result = prune(model, batches, {"params": 0.7}, groups=CHANNELS, similarity=similarity)
    for got, wanted in zip(result.report.importance, rank_heads(model, batches, similarity), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_other_axes_are_refused(make_model, images) -> None:
    with pytest.raises(ValueError, match="axes: wanted one of principal, given, got 'own'"):
        prune(make_model(**SMALL), [images(8, 32)], axes="own")
    with pytest.raises(ValueError, match=r"groups: wanted qk, v or both, got \('heads',\)"):
        principal_axes(make_model(**SMALL), [images(8, 32)], groups=("heads",))
