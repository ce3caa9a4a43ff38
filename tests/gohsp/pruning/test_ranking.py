# SPDX-License-Identifier: Apache-2.0
"""Similarities against their definitions, the chain against its closed form and networkx, the ranking of real heads."""

from __future__ import annotations

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gohsp.pruning.ranking import (
    SIMILARITIES,
    Cosine,
    LinearCKA,
    cut_loss,
    rank_heads,
    read,
    read_by_loss,
    stationary_distribution,
)

HEADS, WIDTH = 4, 6


def outputs(images: int = 10, tokens: int = 7, seed: int = 0) -> Tensor:
    """Outputs of heads that share some signal, [images, tokens, H, d]."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, tokens, 1, WIDTH, generator=generator, dtype=torch.float64)
    own = torch.randn(images, tokens, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    return own + torch.linspace(0, 2, HEADS, dtype=torch.float64)[:, None] * shared + 1.5


def attention_of(x: Tensor) -> Tensor:
    """Some attention probabilities [images, H, tokens, tokens] that go with outputs x."""
    heads = x.transpose(1, 2)
    return (heads @ heads.mT).softmax(dim=-1)


def similarity_of(name: str, x: Tensor, batch: int | None = None, attention: Tensor | None = None) -> Tensor:
    graph = SIMILARITIES[name](x.shape[2], x.shape[3])
    attention = attention_of(x) if attention is None else attention
    for part, probabilities in zip(x.split(batch or len(x)), attention.split(batch or len(x)), strict=True):
        graph.update(part, probabilities)
    return graph.result()


def symmetric(seed: int, size: int = 5) -> Tensor:
    entries = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return entries + entries.T


def test_cka_is_its_definition() -> None:
    """The definition by centred Gram matrices of the samples, which never forms a covariance."""
    x = outputs()
    got = similarity_of("cka", x)
    flat = x.flatten(0, 1)
    samples = len(flat)
    centring = torch.eye(samples, dtype=x.dtype) - 1 / samples
    grams = [centring @ flat[:, head] @ flat[:, head].T @ centring for head in range(HEADS)]
    for i in range(HEADS):
        for j in range(HEADS):
            wanted = (grams[i] * grams[j]).sum() / (grams[i].norm() * grams[j].norm())
            assert got[i, j].item() == pytest.approx(wanted.item(), rel=1e-10)


def test_cka_does_not_see_rotation_scale_and_shift_of_a_head() -> None:
    x = outputs()
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=x.dtype, generator=torch.Generator().manual_seed(1))).Q
    changed = x.clone()
    changed[:, :, 2] = -3.0 * x[:, :, 2] @ rotation + 5.0
    torch.testing.assert_close(similarity_of("cka", changed), similarity_of("cka", x), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(similarity_of("cosine", changed), similarity_of("cosine", x), rtol=1e-2)


def test_cosine_is_its_definition() -> None:
    x = outputs()
    got = similarity_of("cosine", x)
    for i in range(HEADS):
        for j in range(HEADS):
            cosines = torch.cosine_similarity(x[:, :, i].flatten(1), x[:, :, j].flatten(1), dim=1)
            assert got[i, j].item() == pytest.approx(((1 + cosines) / 2).mean().item(), rel=1e-12)


def test_attention_likeness_is_its_definition() -> None:
    x = outputs(images=3, tokens=4)
    p, got = attention_of(x), similarity_of("attention", x)
    for i in range(HEADS):
        for j in range(HEADS):
            mean = (p[:, i] + p[:, j]) / 2
            divergences = [(q * (q / mean).log2()).sum(dim=-1) for q in (p[:, i], p[:, j])]
            assert got[i, j].item() == pytest.approx(1 - ((divergences[0] + divergences[1]) / 2).mean().item())


def test_attention_that_never_overlaps_is_no_likeness_and_zeros_stay_finite() -> None:
    p = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    p[0, 0, :, 0] = p[0, 1, :, 2] = 1.0
    got = similarity_of("attention", outputs(1, 3)[:, :, :2], attention=p)
    torch.testing.assert_close(got, torch.eye(2, dtype=torch.float64))


def test_explained_variance_is_that_of_a_regression() -> None:
    """R^2 from the residuals of a least-squares fit on all samples; the damping accounts for the tolerance."""
    x = outputs(images=40)
    got, flat = similarity_of("explained", x), x.flatten(0, 1) - x.flatten(0, 1).mean(dim=0)
    for i in range(HEADS):
        for j in range(HEADS):
            residual = flat[:, i] - flat[:, j] @ torch.linalg.lstsq(flat[:, j], flat[:, i]).solution
            wanted = 1 - residual.square().sum() / flat[:, i].square().sum()
            assert got[i, j].item() == pytest.approx(wanted.item(), abs=2e-3)


def test_explained_variance_is_directed() -> None:
    """Head 0 knows what head 1 knows and more: it explains all of head 1, which explains a part of it."""
    x = outputs(images=40)
    x[:, :, 1] = 0.0
    x[:, :, 1, :2] = x[:, :, 0, :2]
    got = similarity_of("explained", x)
    assert got[1, 0] > 0.99 > 0.6 > got[0, 1]


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_streaming_is_one_batch(name: str, batch: int) -> None:
    x = outputs()
    torch.testing.assert_close(similarity_of(name, x, batch), similarity_of(name, x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_are_symmetric_where_they_should_be_and_bounded(name: str) -> None:
    got = similarity_of(name, outputs())
    if name != "explained":
        torch.testing.assert_close(got, got.T, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.diagonal(), torch.ones(HEADS, dtype=got.dtype), rtol=2e-3, atol=0)
    assert bool((got >= 0).all())
    assert bool((got <= 1 + 1e-12).all())


def test_a_constant_head_is_like_no_other() -> None:
    x = outputs()
    x[:, :, 1] = 2.0
    got = LinearCKA(HEADS, WIDTH)
    got.update(x)
    others = [0, 2, 3]
    assert got.result()[1, others].abs().max() < 1e-12
    assert bool(torch.isfinite(stationary_distribution(got.result())).all())


def test_cosine_of_a_silent_head_is_neutral() -> None:
    x = outputs()
    x[:, :, 1] = 0.0
    got = Cosine(HEADS, WIDTH)
    got.update(x)
    torch.testing.assert_close(got.result()[1], torch.full((HEADS,), 0.5, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 12))
def test_stationary_distribution_of_a_symmetric_graph_is_the_weighted_degree(seed: int, size: int) -> None:
    graph = symmetric(seed, size)
    degree = (graph - torch.diag(graph.diagonal())).sum(dim=1)
    torch.testing.assert_close(stationary_distribution(graph), degree / degree.sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("teleport", [0.0, 0.15, 0.6])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_stationary_distribution_is_pagerank(teleport: float, is_symmetric: bool) -> None:
    graph = symmetric(3, 7)
    if not is_symmetric:
        graph = graph * torch.linspace(0.2, 3, 7, dtype=graph.dtype)
    graph.fill_diagonal_(0)
    network = networkx.from_numpy_array(graph.numpy(), create_using=networkx.DiGraph)
    ranks = networkx.pagerank(network, alpha=1 - teleport, tol=1e-14, max_iter=10_000)
    wanted = torch.tensor([ranks[node] for node in range(7)], dtype=torch.float64)
    torch.testing.assert_close(stationary_distribution(graph, teleport), wanted, rtol=1e-8, atol=1e-10)


def test_a_node_that_is_like_no_other_jumps_anywhere_as_in_pagerank() -> None:
    graph = symmetric(4, 5)
    graph[2] = 0
    graph[:, 2] = 0
    graph.fill_diagonal_(0)
    network = networkx.from_numpy_array(graph.numpy(), create_using=networkx.DiGraph)
    ranks = networkx.pagerank(network, alpha=0.85, tol=1e-14, max_iter=10_000)
    wanted = torch.tensor([ranks[node] for node in range(5)], dtype=torch.float64)
    torch.testing.assert_close(stationary_distribution(graph, 0.15), wanted, rtol=1e-8, atol=1e-10)


def test_restart_is_where_the_walk_begins_and_jumps_as_in_personalised_pagerank() -> None:
    graph = symmetric(4, 5).fill_diagonal_(0)
    graph[2] = 0
    restart = torch.tensor([0.0, 3.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    network = networkx.from_numpy_array(graph.numpy(), create_using=networkx.DiGraph)
    given = dict(enumerate(restart.tolist()))
    ranks = networkx.pagerank(network, alpha=0.85, personalization=given, tol=1e-14, max_iter=10_000)
    wanted = torch.tensor([ranks[node] for node in range(5)], dtype=torch.float64)
    torch.testing.assert_close(stationary_distribution(graph, 0.15, restart=restart), wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(stationary_distribution(graph, 1.0, restart=restart), restart / restart.sum())


def test_full_teleport_is_uniform() -> None:
    torch.testing.assert_close(stationary_distribution(symmetric(0), 1.0), torch.full((5,), 0.2, dtype=torch.float64))


def test_a_bipartite_graph_converges() -> None:
    """A plain power iteration swings for ever on this star; its stationary distribution is the degree all the same."""
    star = torch.tensor([[0, 1, 2], [1, 0, 0], [2, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(stationary_distribution(star), torch.tensor([3, 1, 2], dtype=torch.float64) / 6)


def test_permuting_the_nodes_permutes_the_distribution() -> None:
    graph, order = symmetric(5), torch.tensor([3, 1, 4, 0, 2])
    got = stationary_distribution(graph[order][:, order], 0.1)
    torch.testing.assert_close(got, stationary_distribution(graph, 0.1)[order])


def test_redundant_turns_the_order_round_and_sums_to_one() -> None:
    pi = stationary_distribution(symmetric(6))
    turned = read(pi, "redundant")
    assert torch.equal(read(pi, "important"), pi)
    assert turned.sum().item() == pytest.approx(1)
    assert pi.argsort().tolist() == turned.argsort(descending=True).tolist()


@pytest.mark.parametrize("bad", [torch.ones(2, 3), torch.ones(3), torch.zeros(0, 0)])
def test_similarity_must_be_square(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"similarity: wanted a square matrix"):
        stationary_distribution(bad)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_similarity_must_be_finite_and_not_negative(value: float) -> None:
    graph = symmetric(0)
    graph[0, 1] = value
    with pytest.raises(ValueError, match="similarity: wanted finite, non-negative entries"):
        stationary_distribution(graph)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_rank_heads_agrees_with_heads_computed_by_hand(make_model, images, name: str) -> None:
    model, batch = make_model(), images(6)
    scores = rank_heads(model, [batch], name)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(batch)))
    for block, got in zip(model.blocks, scores, strict=True):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = ((q @ k.mT * attn.scale).softmax(dim=-1) @ v).transpose(1, 2)
        attention = (q @ k.mT * attn.scale).softmax(dim=-1)
        wanted = stationary_distribution(similarity_of(name, heads.detach(), attention=attention.detach()))
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)
        tokens = block(tokens)


def test_rank_heads_takes_any_kind_of_batches(make_model, images) -> None:
    model, batch = make_model(), images(6)
    pairs = DataLoader(TensorDataset(batch, torch.arange(6)), batch_size=4)
    wanted = rank_heads(model, [batch])
    for batches in (list(batch.split(2)), pairs, iter([(batch, None)])):
        for got, score in zip(rank_heads(model, batches), wanted, strict=True):
            torch.testing.assert_close(got, score, rtol=1e-9, atol=1e-12)


def test_max_images_cuts_within_a_batch(make_model, images) -> None:
    model, batch = make_model(), images(6)
    got = rank_heads(model, [batch[:4], batch[4:]], max_images=5)
    for a, b, whole in zip(got, rank_heads(model, [batch[:5]]), rank_heads(model, [batch]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(a, whole, rtol=1e-6)


def permute_heads(model, order: list[int]) -> None:
    """Reorder the heads of the first block; the model computes the same."""
    attn = model.blocks[0].attn
    heads = torch.tensor(order)
    rows = torch.arange(3 * attn.num_heads * attn.head_dim).view(3, attn.num_heads, -1)[:, heads].flatten()
    columns = torch.arange(attn.num_heads * attn.head_dim).view(attn.num_heads, -1)[heads].flatten()
    with torch.no_grad():
        attn.qkv.weight.copy_(attn.qkv.weight[rows].clone())
        attn.qkv.bias.copy_(attn.qkv.bias[rows].clone())
        attn.proj.weight.copy_(attn.proj.weight[:, columns].clone())


def test_permuting_heads_permutes_scores(make_model, images) -> None:
    model, order = make_model(), [2, 0, 1]
    wanted = rank_heads(model, [images(6)])
    permute_heads(model, order)
    got = rank_heads(model, [images(6)])
    torch.testing.assert_close(got[0], wanted[0][order], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_copies_of_a_head_have_equal_scores(make_model, images, name: str) -> None:
    model = make_model()
    qkv, width = model.blocks[0].attn.qkv, model.blocks[0].attn.head_dim
    with torch.no_grad():
        for parameter in (qkv.weight, qkv.bias):
            rows = parameter.unflatten(0, (3, -1, width))
            rows[:, 2] = rows[:, 0]
    scores = rank_heads(model, [images(6)], name)[0]
    assert scores[0].item() == pytest.approx(scores[2].item(), rel=1e-9)
    assert scores[0] > scores[1]


def test_a_single_head_has_score_one(make_model, images) -> None:
    model = make_model(num_heads=1)
    for high_is in ("important", "redundant"):
        assert [s.tolist() for s in rank_heads(model, [images()], high_is=high_is)] == [[1.0], [1.0]]


def test_rank_heads_leaves_the_model_as_it_was(make_model, images) -> None:
    model = make_model(drop_path_rate=0.5).train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (rank_heads(model, [images(4)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert model.training and not model.blocks[0].training and model.blocks[1].attn.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(score.dtype == torch.float64 and score.sum().item() == pytest.approx(1) for score in first)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cut_loss_is_what_a_regression_on_the_heads_that_stay_leaves() -> None:
    x, weight = noise(500, 12) @ noise(12, 12, seed=1), noise(5, 12, seed=2)
    scores = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)  # heads 1 and 3 go
    x -= x.mean(dim=0)
    stay, go = [0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]
    gone = x[:, go] @ weight[:, go].T
    residual = gone - x[:, stay] @ torch.linalg.lstsq(x[:, stay], gone).solution
    wanted = residual.square().sum() / (x @ weight.T).square().sum()
    assert cut_loss(weight, torch.cov(x.T), scores) == pytest.approx(wanted.item(), rel=0.05)
    assert cut_loss(weight[:, :3], torch.cov(x[:, :3].T), scores[:1]) == 0.0


def test_auto_takes_the_reading_whose_cut_loses_less() -> None:
    """Two blocks whose heads with high scores matter, and then two whose heads with low scores do."""
    covariance = torch.eye(8, dtype=torch.float64)
    pi = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for strong, wanted in (([2, 3], "important"), ([0, 1], "redundant")):
        weight = torch.full((3, 4, 2), 0.1, dtype=torch.float64)
        weight[:, strong] = 1.0
        got = read_by_loss([pi, pi], [weight.flatten(1)] * 2, [covariance] * 2)
        assert got.high_is == wanted
        assert got.losses[wanted] < 0.02 < 0.9 < max(got.losses.values())
        assert all(torch.equal(scores, read(pi, wanted)) for scores in got)


def test_auto_reports_both_losses(make_model, images) -> None:
    got = rank_heads(make_model(), [images(6)], high_is="auto")
    assert set(got.losses) == {"important", "redundant"}
    assert got.high_is == min(got.losses, key=got.losses.__getitem__)
    wanted = rank_heads(make_model(), [images(6)], high_is=got.high_is)
    assert wanted.losses == {}
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "euclid"}, r"similarity: wanted one of cka, cosine, attention, explained, got 'euclid'"),
        ({"teleport": 1.5}, r"teleport: wanted a finite number from 0 to 1, got 1.5"),
        ({"high_is": "best"}, r"high_is: wanted one of important, redundant, auto, got 'best'"),
        ({"max_images": 0}, r"max_images: wanted a whole number from 1 up, got 0"),
    ],
)
def test_wrong_parameters_are_refused(make_model, images, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_heads(make_model(), [images()], **arguments)


def test_models_that_are_no_timm_vit_are_refused(images) -> None:
    with pytest.raises(TypeError, match=r"model: wanted a timm .*VisionTransformer"):
        rank_heads(torch.nn.Linear(3, 3), [images()])
