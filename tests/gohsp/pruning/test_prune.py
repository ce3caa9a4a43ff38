# SPDX-License-Identifier: Apache-2.0
"""Pruning from end to end on small random models: exact costs, exact masks, determinism, what the re-fit is worth."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import gohsp
from gohsp import ModelMask, compress, count
from gohsp.models.registry import open_model
from gohsp.pruning import learned
from gohsp.pruning.axes import principal_axes
from gohsp.pruning.calibration import embed
from gohsp.pruning.criteria import CRITERIA
from gohsp.pruning.latency import LatencyTable
from gohsp.pruning.layerwise import OPTIMISERS
from gohsp.pruning.moments import Moments
from gohsp.pruning.prune import PruneResult, prune
from gohsp.pruning.ranking import SIMILARITIES, rank_heads
from gohsp.pruning.scoring import PruneSettings, score_groups
from gohsp.pruning.sensitivity import measure_sensitivities
from gohsp.pruning.share import Share

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}  # heads of 16, 192 neurons
ALL_GROUPS = ("heads", "hidden", "qk", "v")


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned scores hold what all criteria hold after few steps of their training as well."""
    monkeypatch.setattr(learned, "STEPS", 4)


def batches_of(images, count: int = 24) -> list[Tensor]:
    return list(images(count, 32).split(8))


def same(first: PruneResult, second: PruneResult) -> bool:
    states = first.model.state_dict(), second.model.state_dict()
    return first.mask.blocks == second.mask.blocks and all(torch.equal(v, states[1][n]) for n, v in states[0].items())


def distance(model: Any, reference: Any, batch: Tensor) -> float:
    with torch.no_grad():
        return ((model(batch) - reference(batch)).norm() / reference(batch).norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("groups", [("heads", "hidden"), ALL_GROUPS])
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_target_is_met_exactly_as_counted(make_model, images, method, groups, kind) -> None:
    model = make_model(**SMALL)
    result = prune(model, batches_of(images), {kind: 0.6}, method, groups=groups)
    dense, kept = count(model), count(model, mask=result.mask)
    assert result.report.dense == dense
    assert result.report.pruned == kept == count(compress(result.model, result.mask))
    assert getattr(kept, kind) <= 0.6 * getattr(dense, kind)
    for layout, budget in zip((block.layout() for block in result.mask.blocks), result.report.budgets, strict=True):
        assert (len(layout.heads), len(layout.hidden)) == (budget.heads, budget.hidden)
        assert (sum(layout.qk_widths), sum(layout.v_widths)) == (budget.qk, budget.v)
    tile = 16 * (2 * 48 + 1) if kind == "params" else 5 * 16 * 2 * 48
    assert getattr(kept, kind) > 0.6 * getattr(dense, kind) - tile


@pytest.mark.parametrize(
    ("groups", "share"), [(("heads", "hidden"), 0.7), (ALL_GROUPS, 0.6), (("v",), 0.96), (("qk", "hidden"), 0.7)]
)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_model_is_masked_and_compresses_exactly(
    make_model, images, relative_error, groups, share, optimiser
) -> None:
    model = make_model(**SMALL, init_values=0.3)
    result = prune(model, batches_of(images), {"params": share}, groups=groups, optimiser=optimiser)
    masked = result.mask.apply_(copy.deepcopy(result.model))
    assert all(torch.equal(v, masked.state_dict()[n]) for n, v in result.model.state_dict().items())
    fresh = images(4, 32, seed=9)
    assert relative_error(compress(result.model, result.mask)(fresh), result.model(fresh)) < 1e-12
    full = ModelMask.full(model)
    for block, dense, budget in zip(result.mask.blocks, full.blocks, result.report.budgets, strict=True):
        layout = block.layout()
        widths = (len(layout.heads), sum(layout.qk_widths), sum(layout.v_widths), layout.hidden.numel())
        assert widths == (budget.heads, budget.qk, budget.v, budget.hidden)
        assert budget.hidden % 16 == 0
        assert all(width % 8 == 0 and width for width in (*layout.qk_widths, *layout.v_widths))
        for name in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
            assert torch.equal(getattr(block, name), getattr(dense, name))
        assert "heads" in groups or bool(block.heads.all())
        assert "hidden" in groups or bool(block.hidden.all())


def test_input_model_and_its_mode_stay_as_they_were(make_model, images) -> None:
    model = make_model(**SMALL, drop_path_rate=0.3).train()
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    result = prune(model, batches_of(images), {"params": 0.7})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in (*model.modules(), *result.model.modules()))
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (*model.modules(), *result.model.modules()))
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", CRITERIA)
def test_the_same_seed_gives_the_same_result(make_model, images, method: str) -> None:
    def once(seed: int) -> PruneResult:
        torch.manual_seed(seed + 100)  # the global generator must not matter
        return prune(make_model(**SMALL), batches_of(images), {"params": 0.6}, method, groups=ALL_GROUPS, seed=3)

    assert same(once(0), once(1))


def test_another_seed_is_another_chance(make_model, images) -> None:
    results = [prune(make_model(**SMALL), batches_of(images), {"params": 0.6}, "random", seed=s) for s in (0, 1)]
    assert results[0].mask.blocks != results[1].mask.blocks


def test_batching_and_labels_do_not_matter(make_model, images) -> None:
    model, batch = make_model(**SMALL), images(24, 32)
    loader = DataLoader(TensorDataset(batch, torch.arange(24)), batch_size=5)
    first, second = prune(model, [batch], {"params": 0.6}), prune(model, loader, {"params": 0.6})
    assert first.mask.blocks == second.mask.blocks
    assert distance(first.model, second.model, batch) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("method", CRITERIA)
def test_refitting_brings_the_outputs_nearer_to_the_dense_models(make_model, images, method: str) -> None:
    """On images that the fit has seen and on others."""
    model, calibration = make_model(**SMALL), list(images(128, 32).split(32))
    dropped, fitted = (
        prune(model, calibration, {"params": 0.7}, method, optimiser=optimiser) for optimiser in ("drop", "ridge")
    )
    assert fitted.report.errors[-1] < 0.7 * dropped.report.errors[-1]
    for batch in (calibration[0], images(32, 32, seed=5)):
        assert distance(fitted.model, model, batch) < 0.9 * distance(dropped.model, model, batch)


def make_redundant(model: Any) -> None:
    """Give each block a head twice, and make every other neuron a constant: pruning these can cost nothing."""
    with torch.no_grad():
        for block in model.blocks:
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                rows = parameter.unflatten(0, (3, 3, 16))
                rows[:, 2] = rows[:, 0]
            block.mlp.fc1.weight[::2] = 0
            # What a constant neuron seems to cost is the damping times its outgoing weight, so those are made equal.
            block.mlp.fc1.weight[1::2] *= 4
            block.mlp.fc2.weight /= block.mlp.fc2.weight.norm(dim=0)


@pytest.mark.parametrize("group", ["heads", "hidden"])
def test_what_follows_from_the_rest_is_pruned_without_a_trace(make_model, images, group: str) -> None:
    model = make_model(**{**SMALL, "depth": 1})  # one block, whose budget is then known
    make_redundant(model)
    lean = ModelMask.keep_first(model, **{group: 2 if group == "heads" else 112})
    target = {"params": count(model, mask=lean).params / count(model).params}
    fitted, dropped = (
        prune(model, batches_of(images), target, groups=(group,), guidance=0.0, ridge=0.0, optimiser=optimiser)
        for optimiser in ("ridge", "drop")
    )
    for block in fitted.mask.blocks:
        if group == "heads":
            assert int(block.heads[[0, 2]].sum()) == 1
        else:
            assert block.hidden[1::2].all() and int(block.hidden.sum()) == 112
    fresh = images(8, 32, seed=7)
    assert distance(fitted.model, model, fresh) < 1e-5
    assert distance(dropped.model, model, fresh) > 0.01  # a thousand times more


def test_the_fit_sees_the_attention_that_is_left(make_model, images) -> None:
    """Once QK channels have gone, proj is the least-squares solution for what the heads give then."""
    model = make_model(**{**SMALL, "depth": 1}, init_values=1.0)
    full = prune(model, batches_of(images), {"params": 1.0}).report.budgets
    result = prune(model, batches_of(images), groups=("qk",), budgets=[replace(full[0], qk=24)], ridge=0.0)
    dense, pruned = (open_model(of).sublayers[0] for of in (model, result.model))
    moments = Moments(pruned.write.in_features, pruned.write.out_features)
    with torch.no_grad():
        stream, _ = embed(open_model(model), batches_of(images))
        weights = measure_sensitivities(open_model(model), stream)[0].weights()
        hidden = pruned.trace(stream).hidden
        moments.update(hidden, (dense(stream) - stream) / dense.gain(), weights.expand(hidden.shape[:2]))
    again, bias = moments.fit(dense.write.weight, torch.arange(pruned.write.in_features), 0.0)
    torch.testing.assert_close(pruned.write.weight, again, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pruned.write.bias, bias, rtol=1e-6, atol=1e-6)
    assert distance(result.model, model, images(8, 32, seed=7)) > 1e-3  # something was lost that a fit could see


COLUMN_GROUPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("method", ["gohsp", "taylor", "information"])
def test_residual_features_are_pruned_matrix_by_matrix(make_model, images, relative_error, method, optimiser) -> None:
    model = make_model(**SMALL, init_values=0.3)
    result = prune(model, batches_of(images), {"params": 0.9}, method, groups=COLUMN_GROUPS, optimiser=optimiser)
    assert count(model, mask=result.mask).params <= 0.9 * count(model).params
    for block, budget in zip(result.mask.blocks, result.report.budgets, strict=True):
        for name in COLUMN_GROUPS:
            assert int(getattr(block, name).sum()) == getattr(budget, name) >= 16
        assert bool(block.heads.all() and block.hidden.all())
    assert any(int(getattr(block, name).sum()) < 48 for block in result.mask.blocks for name in COLUMN_GROUPS)
    fresh = images(4, 32, seed=9)
    assert relative_error(compress(result.model, result.mask)(fresh), result.model(fresh)) < 1e-12


def test_features_that_are_read_but_follow_from_others_cost_nothing(make_model, images) -> None:
    """The norm gives each of the last 16 features of the stream as a copy of another: fc1 need not read them."""
    model = make_model(**{**SMALL, "depth": 1})
    with torch.no_grad():
        for weight in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed, model.cls_token):
            features = weight.movedim(-1, 0) if weight.dim() == 3 else weight
            features[32:] = features[16:32]
        for block in model.blocks:
            for parameter in (block.attn.proj.weight, block.attn.proj.bias):
                parameter[32:] = parameter[16:32]
            block.norm2.weight[32:] = block.norm2.weight[16:32]
            block.norm2.bias[32:] = block.norm2.bias[16:32]
    full = prune(model, batches_of(images), {"params": 1.0}).report.budgets
    result = prune(
        model, batches_of(images), groups=("mlp_in",), budgets=[replace(full[0], mlp_in=32)], ridge=0.0, method="obs"
    )
    kept = result.mask.blocks[0].mlp_in
    assert int((kept[16:32].long() + kept[32:].long()).min()) == 1  # one of each pair
    assert distance(result.model, model, images(8, 32, seed=7)) < 1e-5


@pytest.mark.slow
def test_refining_brings_each_block_nearer_and_keeps_the_zeros(make_model, images) -> None:
    model, calibration = make_model(**SMALL), list(images(64, 32).split(32))
    plain, refined = (prune(model, calibration, {"params": 0.6}, refine=steps) for steps in (0, 300))
    assert plain.mask.blocks[0] == refined.mask.blocks[0]
    assert refined.report.errors[0] < 0.9 * plain.report.errors[0]
    assert refined.report.errors[-1] < 0.9 * plain.report.errors[-1]
    masked = refined.mask.apply_(copy.deepcopy(refined.model))
    assert all(torch.equal(v, masked.state_dict()[n]) for n, v in refined.model.state_dict().items())
    assert all(p.grad is None for p in refined.model.parameters())
    assert [p.requires_grad for p in refined.model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_budgets_of_another_run_are_followed(make_model, images) -> None:
    model = make_model(**SMALL)
    first = prune(model, batches_of(images), {"params": 0.6}, "random")
    second = prune(model, batches_of(images), budgets=first.report.budgets)
    assert second.report.budgets == first.report.budgets
    assert second.report.pruned == first.report.pruned
    assert second.mask.blocks != first.mask.blocks


def test_floors_are_kept(make_model, images) -> None:
    result = prune(make_model(**SMALL), batches_of(images), {"params": 0.7}, "random", floors={"heads": 1.0})
    assert all(budget.heads == 3 for budget in result.report.budgets)


def test_high_is_auto_says_what_it_took(make_model, images) -> None:
    model = make_model(**SMALL)
    got = prune(model, batches_of(images), {"params": 0.6}, high_is="auto")
    heads = got.report.importance
    assert heads.high_is == min(heads.losses, key=heads.losses.__getitem__)
    assert same(got, prune(model, batches_of(images), {"params": 0.6}, high_is=heads.high_is))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_guides(make_model, images, similarity: str) -> None:
    model = make_model(**SMALL)
    result = prune(model, batches_of(images), {"params": 0.7}, similarity=similarity)
    for got, wanted in zip(result.report.importance, rank_heads(model, batches_of(images), similarity), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_a_ranking_of_ones_own_guides(make_model, images) -> None:
    model, target = make_model(**SMALL), {"params": 0.7}
    ranked = rank_heads(model, batches_of(images), "cosine")
    own = prune(model, batches_of(images), target, importance=ranked)
    assert own.report.importance is ranked
    assert same(own, prune(model, batches_of(images), target, similarity="cosine"))
    depth = len(ranked)
    for head in range(3):
        scores = [torch.eye(3)[head] * 7] * depth
        result = prune(model, batches_of(images), target, groups=("heads", "hidden", "qk", "v"), importance=scores)
        assert all(block.heads[head] for block in result.mask.blocks)
        assert all(torch.equal(block, torch.eye(3).double()[head]) for block in result.report.importance)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ([torch.ones(3)], "each of 2 blocks, got 1"),
        ([torch.ones(3), torch.ones(2)], r"3 scores for block 1, got shape \(2,\)"),
        ([torch.tensor([1.0, -1.0, 1.0])] * 2, "from 0 up, not all 0, for block 0"),
        ([torch.zeros(3)] * 2, "from 0 up, not all 0, for block 0"),
        ([torch.tensor([1.0, torch.nan, 1.0])] * 2, "finite scores"),
    ],
)
def test_scores_that_do_not_fit_are_refused(make_model, images, importance, message) -> None:
    model = make_model(**SMALL | {"depth": 2})
    with pytest.raises(ValueError, match=f"importance: wanted .*{message}"):
        prune(model, batches_of(images), importance=importance)


def table(scale: float = 1.0) -> LatencyTable:
    return LatencyTable(
        dim=48,
        num_heads=3,
        head_dim=16,
        hidden=192,
        batch=1,
        threads=1,
        outside=0.5,
        attention=(0.2, 0.3, 0.4),
        neurons=(48, 96, 192),
        mlp=(0.1 * scale, 0.2 * scale, 0.5 * scale),
    )


def test_a_target_in_milliseconds_is_met_by_the_table(make_model, images) -> None:
    model, latency = make_model(**SMALL), table()
    arguments = {"target": {"ms": 0.8}, "groups": ("heads", "hidden")}
    result = prune(model, batches_of(images), latency=latency, **arguments)
    dense = 0.5 + 2 * (0.4 + 0.5)
    got = latency.outside + sum(sum(latency.block_cost(budget)) for budget in result.report.budgets)
    assert 0.8 * dense - 0.1 < got <= 0.8 * dense + 1e-6
    cheap = prune(model, batches_of(images), latency=table(0.01), **arguments).report.budgets
    assert sum(b.heads for b in cheap) < sum(b.heads for b in result.report.budgets)  # neurons cost next to nothing


def test_a_table_for_other_blocks_or_groups_is_refused(make_model, images) -> None:
    arguments = {"batches": batches_of(images, 8), "target": {"ms": 0.8}}
    with pytest.raises(ValueError, match=r"latency: wanted a table for .* got one for dim=48"):
        prune(make_model(), [images(2)], {"ms": 0.8}, latency=table())
    with pytest.raises(ValueError, match="groups: a target in ms knows nothing of mlp_in"):
        prune(make_model(**SMALL), **arguments, latency=table(), groups=("heads", "mlp_in"))


def test_nothing_is_lost_when_nothing_has_to_go(make_model, images) -> None:
    model = make_model(**SMALL)
    result = prune(model, batches_of(images), {"params": 1.0})
    assert result.mask.blocks == ModelMask.full(model).blocks
    assert result.report.pruned == result.report.dense
    assert distance(result.model, model, images(4, 32, seed=3)) < 1e-9
    assert max(result.report.errors) < 1e-18


def test_the_graph_guides_the_choice_of_heads(make_model, images) -> None:
    """Strong guidance keeps the heads with the highest scores, whichever way the scores are read."""
    model = make_model(**SMALL)
    for high_is in ("important", "redundant"):
        arguments = {"groups": ("heads",), "guidance": 500.0, "high_is": high_is}
        result = prune(model, batches_of(images), {"params": 0.9}, **arguments)
        ranking = rank_heads(model, batches_of(images), high_is=high_is)
        pruned = [block for block in result.mask.blocks if not bool(block.heads.all())]
        assert pruned
        for block, scores, wanted in zip(result.mask.blocks, result.report.importance, ranking, strict=True):
            torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-9)
            kept = scores.argsort(descending=True)[: int(block.heads.sum())]
            assert sorted(kept.tolist()) == block.heads.nonzero().flatten().tolist()


def test_the_graph_guides_the_budget_of_heads(make_model, images) -> None:
    """A head that scores low is offered first, and at a lower price than without guidance."""
    model = make_model(**SMALL)
    scores = [torch.tensor([0.4, 0.6 - 1e-6, 1e-6]), torch.tensor([1e-6, 0.6 - 1e-6, 0.4])]
    lost = []
    for guidance in (0.0, 1.0):
        with torch.no_grad():
            stream, _ = embed(open_model(model), batches_of(images))
            settings = PruneSettings("gohsp", ("heads",), "ridge", 0, "cka", 0.0, "important", guidance, 0.3)
            sensitivities = measure_sensitivities(open_model(model), stream)
            found = score_groups(
                *(open_model(model), stream, sensitivities, settings, Share.of(len(stream), shared=False)),
                *(torch.Generator(), lambda: None, scores),
            )
        lost.append([steps["heads"][0].loss for steps in found.steps])
    assert [steps["heads"][0].head for steps in found.steps] == [2, 0]
    assert all(guided < 1e-3 * plain for plain, guided in zip(*lost, strict=True))


def test_without_guidance_the_graph_does_not_matter(make_model, images) -> None:
    def once(similarity: str, guidance: float) -> PruneResult:
        arguments = {"similarity": similarity, "guidance": guidance}
        return prune(make_model(**SMALL), batches_of(images), {"params": 0.6}, **arguments)

    assert same(once("cka", 0.0), once("cosine", 0.0))
    assert not same(once("cka", 30.0), once("cosine", 30.0))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"num_heads": 1}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "map"}),
        ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0, "reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}),
        ("vit_tiny_patch16_224", {"num_heads": 4, "mlp_ratio": 2.1}),  # heads of 12, 100 neurons
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_kinds_of_models(make_model, images, relative_error, name: str, arguments: dict[str, Any]) -> None:
    model = make_model(name, **(SMALL | arguments))
    groups = ("heads", "hidden", "v") if arguments.get("qk_norm") else ALL_GROUPS
    result = prune(model, batches_of(images, 16), {"params": 0.7}, groups=groups)
    assert count(model, mask=result.mask).params <= 0.7 * count(model).params
    batch = images(2, 32, seed=4)
    assert relative_error(compress(result.model, result.mask)(batch), result.model(batch)) < 1e-10
    assert bool(torch.isfinite(result.model(batch)).all())


def test_a_feature_whose_layer_scale_is_zero_stays_finite(make_model, images) -> None:
    model = make_model(**SMALL, init_values=0.3)
    with torch.no_grad():
        model.blocks[0].ls1.gamma[:5] = 0
    result = prune(model, batches_of(images), {"params": 0.7})
    assert all(bool(torch.isfinite(value).all()) for value in result.model.state_dict().values())


def test_float32_models_and_gradient_free_modes(make_model, images) -> None:
    model = make_model(**SMALL).float()
    wanted = prune(model, batches_of(images), {"params": 0.6})
    with torch.inference_mode():
        got = prune(model, batches_of(images), {"params": 0.6})
    assert same(got, wanted)
    assert all(value.dtype == torch.float32 for value in got.model.state_dict().values())


def test_progress_is_told_to_the_end(make_model, images) -> None:
    seen: list[tuple[int, int]] = []
    prune(make_model(**SMALL), batches_of(images), {"params": 0.7}, on_progress=lambda *step: seen.append(step))
    assert seen == [(step, 12) for step in range(1, 13)]  # the axes of two blocks take three


def test_the_package_gives_the_functions_and_not_their_modules() -> None:
    assert gohsp.prune is prune
    assert gohsp.rank_heads is rank_heads


def test_channels_go_by_default_but_those_that_a_norm_mixes(make_model, images) -> None:
    for arguments, turned in (({}, ("qk", "v")), ({"qk_norm": True}, ("v",))):
        result = prune(make_model(**SMALL, **arguments), batches_of(images), {"params": 0.7})
        assert result.report.turned == result.mask.turned == turned
        assert not all(block.v.all() for block in result.mask.blocks)
        assert all(block.qk.all() for block in result.mask.blocks) == ("qk" not in turned)


def test_a_mask_of_turned_heads_warns_where_the_model_is_not_turned(make_model, images, tmp_path) -> None:
    model, batches = make_model(**SMALL), batches_of(images)
    result = prune(model, batches, {"params": 0.7})
    result.mask.save(tmp_path / "mask.json")
    mask = ModelMask.load(tmp_path / "mask.json")
    assert mask == result.mask and mask.turned == ("qk", "v")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(result.model, mask)
        compress(principal_axes(model, batches), mask)
    with pytest.warns(UserWarning, match="mask: it is of heads in their principal axes"):
        compress(model, mask)


def test_max_images_is_heeded(make_model, images) -> None:
    model, batch = make_model(**SMALL), images(24, 32)
    assert same(prune(model, [batch], max_images=9), prune(model, [batch[:9]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "best"},
            "method: wanted one of gohsp, obs, random, l1, l2, taylor, activation, information, graph, "
            "graph-relearnt, learned, learned-graph, got",
        ),
        ({"optimiser": "sgd"}, "optimiser: wanted one of ridge, admm, drop, got 'sgd'"),
        ({"groups": ("heads", "mlp")}, "groups: wanted some of heads, qk, v, attn_in, attn_out, hidden, mlp_in"),
        ({"budgets": []}, "budgets: wanted one for each of 2 blocks, got 0"),
        ({"refine": -1}, "refine: wanted a whole number from 0 up, got -1"),
        (
            {"groups": ("heads", "hidden"), "floors": {"v": 0.5}},
            "floors: wanted shares from 0 to 1 of heads, hidden, got 'v': 0.5",
        ),
        ({"floors": {"heads": 1.5}}, "floors: wanted shares from 0 to 1 of heads, hidden, qk, v, got 'heads': 1.5"),
        ({"groups": ()}, "groups: wanted some of"),
        ({"groups": ("v", "v")}, "groups: wanted some of"),
        ({"similarity": "rbf"}, "similarity: wanted one of"),
        ({"teleport": -1.0}, "teleport: wanted a finite number from 0 to 1"),
        ({"high_is": "best"}, "high_is: wanted one of"),
        ({"guidance": float("nan")}, "guidance: wanted a finite number, got nan"),
        ({"ridge": -0.1}, "ridge: wanted a finite number from 0 up, got -0.1"),
        ({"max_images": 0}, "max_images: wanted a whole number from 1 up"),
        ({"target": {"ms": 0.5}}, "latency: wanted a table for a target in ms"),
        ({"target": {"bytes": 0.5}}, "target: wanted one of params or macs or ms"),
        (
            {"target": {"params": 0.01}},
            "target: 0.01 of the cost is out of reach .* the least that can be kept is 0.",
        ),
        ({"batches": []}, "batches: wanted at least one image"),
    ],
)
def test_wrong_parameters_are_refused(make_model, images, arguments: dict[str, Any], message: str) -> None:
    arguments = {"batches": batches_of(images, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        prune(make_model(**SMALL), **arguments)


def test_qk_channels_of_a_qk_norm_model_are_refused(make_model, images) -> None:
    with pytest.raises(ValueError, match="groups: wanted no 'qk' for this model, because qk-norm"):
        prune(make_model(**SMALL, qk_norm=True), batches_of(images, 8), groups=("qk",))


def test_a_compressed_model_is_refused(make_model, images) -> None:
    model = make_model(**SMALL)
    compact = compress(model, ModelMask.full(model))
    with pytest.raises(ValueError, match="already compressed"):
        prune(compact, batches_of(images, 8))


@pytest.mark.parametrize("by_name", [False, True])
def test_what_is_ignored_stays_whole(make_model, images, by_name: bool) -> None:
    model = make_model(**SMALL)
    ignore = ["blocks.0.attn.qkv", "blocks.1.mlp"] if by_name else [model.blocks[0].attn, model.blocks[1].mlp]
    result = prune(model, batches_of(images), {"params": 0.8}, ignore=ignore)
    first, last = result.mask.blocks
    assert first.heads.all() and first.qk.all() and first.v.all() and last.hidden.all()
    assert not first.hidden.all()
    assert result.report.pruned.params <= 0.8 * result.report.dense.params
    whole = prune(model, batches_of(images), {"params": 0.9}, ignore=["blocks.0"]).mask.blocks[0]
    assert whole == ModelMask.full(model).blocks[0]


@pytest.mark.parametrize(
    ("ignore", "error", "message"),
    [
        (["blocks.7"], ValueError, "ignore: the model has no module 'blocks.7'"),
        (["patch_embed"], ValueError, "ignore: wanted modules in or around the model's blocks, got patch_embed"),
        ([3], TypeError, "ignore: wanted modules or names of modules, got int"),
        ("blocks.0", TypeError, "ignore: wanted a list of modules or names"),
        (["blocks"], ValueError, "target: "),
    ],
)
def test_what_cannot_be_ignored_is_said(make_model, images, ignore: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prune(make_model(**SMALL), batches_of(images), {"params": 0.5}, ignore=ignore)


def test_budgets_leave_nothing_to_ignore(make_model, images) -> None:
    model = make_model(**SMALL)
    budgets = prune(model, batches_of(images), {"params": 0.8}).report.budgets
    with pytest.raises(ValueError, match="ignore: wanted none beside budgets"):
        prune(model, batches_of(images), budgets=budgets, ignore=["blocks.0"])
