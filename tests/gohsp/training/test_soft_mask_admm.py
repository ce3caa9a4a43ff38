# SPDX-License-Identifier: Apache-2.0
"""ADMM's parts against what they are by definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gohsp
from gohsp.training.soft_mask_admm import SoftMaskAdmm

from . import digits_run as runs

HEADS, WIDTH = 4, 8


@pytest.fixture
def model() -> Any:
    return runs.make_vit().double()


def make(model: Any, importance: Any = runs.EVEN, **settings: Any) -> SoftMaskAdmm:
    return SoftMaskAdmm(model, runs.make_plan(model), importance, gohsp.Admm(**settings))


def head_norm(block: Any, head: int) -> float:
    rows = torch.cat([torch.arange(WIDTH) + part * HEADS * WIDTH + head * WIDTH for part in range(3)])
    columns = torch.arange(WIDTH) + head * WIDTH
    squares = block.attn.qkv.weight[rows].square().sum() + block.attn.proj.weight[:, columns].square().sum()
    return float(squares.detach().sqrt())


def test_heads_and_neurons_of_largest_norm_are_kept(model: Any) -> None:
    admm = make(model)
    admm.project(0.1)
    for block, mask, (heads, hidden) in zip(model.blocks, admm.mask().blocks, ((3, 40), (2, 24)), strict=True):
        norms = [head_norm(block, head) for head in range(HEADS)]
        assert mask.heads.nonzero().flatten().tolist() == sorted(sorted(range(HEADS), key=lambda h: -norms[h])[:heads])
        fc1, fc2 = block.mlp.fc1.weight, block.mlp.fc2.weight
        neurons = (fc1.square().sum(dim=1) + fc2.square().sum(dim=0)).topk(hidden).indices
        assert set(mask.hidden.nonzero().flatten().tolist()) == set(neurons.tolist())


def test_the_graph_guides_the_choice_of_heads(model: Any) -> None:
    for favourite in range(HEADS):
        scores = torch.full((HEADS,), 1e-3, dtype=torch.float64)
        scores[favourite] = 1 - 3e-3
        admm = make(model, [scores, scores])
        assert all(block.heads[favourite] for block in admm.mask().blocks)
    indifferent = make(model, [scores, scores], guidance=0.0)
    assert indifferent.mask() == make(model).mask()


def test_z_is_w_plus_u_with_the_pruned_heads_softened_and_the_pruned_neurons_at_zero(model: Any) -> None:
    admm = make(model, anneal=0.5)
    before = [(part.weight + part.u).clone() for part in admm.splits]
    admm.project(0.25)
    assert admm.softness == pytest.approx(0.5)
    soft = gohsp.ModelMask.full(model)
    for block, kept in zip(soft.blocks, admm.mask().blocks, strict=True):
        block.heads, block.hidden = kept.heads, kept.hidden
    masked = runs.make_vit().double()
    masked.load_state_dict(model.state_dict())
    soft.apply_(masked)
    for part, v, block in zip(admm.splits, before, [b for b in masked.blocks for _ in range(4)], strict=True):
        layers = {(96, 32): block.attn.qkv, (32, 32): block.attn.proj, (64, 32): block.mlp.fc1, (32, 64): block.mlp.fc2}
        hard = layers[tuple(v.shape)].weight
        wanted = 0.5 * (v + hard) if part.heads else hard
        torch.testing.assert_close(part.z, wanted, rtol=1e-12, atol=0)


def test_the_soft_mask_goes_from_one_to_zero_along_a_cosine(model: Any) -> None:
    admm = make(model, anneal=0.8)
    assert admm.softness == 1.0
    for progress in (0.0, 0.2, 0.4, 0.8, 1.0):
        admm.project(progress)
        assert admm.softness == pytest.approx(0.5 * (1 + math.cos(math.pi * min(1, progress / 0.8))), abs=1e-15)
    assert admm.softness == 0.0


def test_pull_minimises_the_proximal_problem(model: Any) -> None:
    admm = make(model, rho=3.0)
    admm.project(0.5)
    start = [part.weight.detach().clone() for part in admm.splits]
    lr, rho = 0.1, admm.rho
    admm.pull_(lr)
    for part, before in zip(admm.splits, start, strict=True):
        # d/dW of ||W - before||^2 / (2 lr) + rho/2 ||W - Z + U||^2 is zero.
        slope = (part.weight - before) / lr + rho * (part.weight - part.z + part.u)
        assert float(slope.detach().abs().max()) < 1e-12


def test_the_multiplier_stays_while_rho_grows(model: Any) -> None:
    admm = make(model, rho=1.0, rho_growth=2.0, rho_max=3.0)
    admm.project(0.5)
    assert admm.rho == 2.0
    for part in admm.splits:  # rho u is the old rho times W - Z
        torch.testing.assert_close(admm.rho * part.u, part.weight.detach() - part.z, rtol=1e-12, atol=1e-15)
    admm.project(0.6)
    assert admm.rho == 3.0


def test_the_residual_is_the_distance_over_the_norm_and_ends_the_stage(model: Any) -> None:
    admm = make(model, tolerance=0.05, anneal=0.5)
    gap = admm.project(1.0)
    weights = [(part.weight.detach(), part.z) for part in admm.splits]
    squares = [((w - z).square().sum(), w.square().sum()) for w, z in weights]
    wanted = (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
    assert gap == pytest.approx(float(wanted), rel=1e-12) and not admm.converged
    with torch.no_grad():
        for part in admm.splits:
            part.u.zero_()
            part.weight.copy_(part.z)
    assert admm.project(1.0) == 0.0 and admm.converged
    admm.project(0.25)
    assert not admm.converged  # the soft mask is not at zero


def test_without_a_loss_w_reaches_the_constraint(model: Any) -> None:
    admm = make(model, rho=5.0, rho_growth=1.2, rho_max=100.0, tolerance=1e-3)
    for step in range(40):
        for _ in range(5):
            admm.pull_(0.05)
        admm.project(step / 20)
        if admm.converged:
            break
    assert admm.converged
    masked = admm.mask().apply_(runs.make_vit().double())
    masked.load_state_dict(model.state_dict())
    kept = admm.mask().apply_(masked)
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2", "attn.qkv"):
        for block, other in zip(model.blocks, kept.blocks, strict=True):
            ours, theirs = block.get_submodule(name).weight, other.get_submodule(name).weight
            assert float((ours - theirs).detach().norm() / ours.detach().norm()) < 5e-3


def test_state_goes_into_a_checkpoint_and_comes_back(model: Any) -> None:
    admm = make(model)
    admm.project(0.3)
    again = make(model)
    again.restore({name: tensor.clone() for name, tensor in admm.tensors().items()}, dict(admm.values()))
    assert again.mask() == admm.mask() and again.values() == admm.values()
    assert all(torch.equal(a.z, b.z) and torch.equal(a.u, b.u) for a, b in zip(admm.splits, again.splits, strict=True))


def test_channels_of_a_pruned_head_may_be_pruned_too(model: Any) -> None:
    plan = runs.make_plan(model)
    plan.blocks[0].qk[3] = plan.blocks[0].v[3] = False
    SoftMaskAdmm(model, plan, runs.EVEN, gohsp.Admm())


@pytest.mark.parametrize("name", ["qk", "v", "attn_in", "mlp_out"])
def test_a_plan_that_prunes_anything_else_is_refused(model: Any, name: str) -> None:
    plan = runs.make_plan(model)
    getattr(plan.blocks[1], name)[..., 0] = False
    with pytest.raises(ValueError, match=r"blocks\[1\] prunes channels or columns"):
        SoftMaskAdmm(model, plan, runs.EVEN, gohsp.Admm())


def test_importance_of_another_shape_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"importance: wanted 2 tensors of shapes .*\(4,\)\], got shapes \[\(4,\)\]"):
        make(model, runs.EVEN[:1])
