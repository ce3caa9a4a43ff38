# SPDX-License-Identifier: Apache-2.0
"""The reference against the definition written out longhand, and its gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gohsp_kernels.testing import Maker, error, samples

ATTENTIONS = [
    ([8, 8], [8, 8]),
    ([8, 3, 8], [4, 8, 1]),
    ([0, 5], [6, 2]),
    ([4, 4], [0, 7]),
    ([], []),
]


def attention_longhand(qkv: Tensor, qk: list[int], v: list[int], scale: float) -> Tensor:
    outputs = []
    n_qk = sum(qk)
    for head in range(len(qk)):
        a, b = sum(qk[:head]), sum(qk[: head + 1])
        c, d = sum(v[:head]), sum(v[: head + 1])
        queries, keys = qkv[..., a:b], qkv[..., n_qk + a : n_qk + b]
        values = qkv[..., 2 * n_qk + c : 2 * n_qk + d]
        outputs.append((queries @ keys.transpose(1, 2) * scale).softmax(-1) @ values)
    return torch.cat(outputs, -1) if outputs else qkv[..., :0]


@pytest.mark.parametrize(("qk", "v"), ATTENTIONS)
def test_attention_is_softmax_attention_head_by_head(qk: list[int], v: list[int]) -> None:
    call = Maker(1).attention(2, 7, qk, v).to(torch.float64)
    assert error(call.run("reference"), attention_longhand(call.x, qk, v, 0.25)) < 1e-12


MORE: dict[str, tuple[list[int], Callable[[int], dict[str, Any]]]] = {
    "plain": ([8, 3, 8], lambda tokens: {}),
    "a head without QK channels": ([8, 0, 3], lambda tokens: {"num_queries": 5}),
    "biases": ([8, 0, 3], lambda tokens: Maker(3).bias(3, tokens, 2)),
    "cosines": ([8, 2, 3], lambda tokens: {"logit_scale": torch.tensor([1.0, 0.0, 2.0])}),
    "norms": ([8, 8, 8], lambda tokens: Maker(3).qk_norm(8)),
    "rotary positions": ([8, 2, 4], lambda tokens: {"rope": Maker(3).rope(tokens, [8, 2, 4])}),
}


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", MORE)
def test_attention_with_gradients_is_the_same_by_products_and_fused(part: str, dtype: torch.dtype, tokens: int) -> None:
    qk, more = MORE[part]
    call = Maker(1).attention(2, tokens, qk, [4, 8, 1], **more(tokens)).to(dtype)
    cost = Maker(2).attention(2, call.num_queries or tokens, [4, 8, 1], [4, 8, 1]).x[..., :13]

    def run(precision: torch.dtype, wanted: bool) -> tuple[Tensor, ...]:
        own = call.to(precision)
        own = own.with_x(own.x.detach().requires_grad_(wanted))
        with torch.set_grad_enabled(wanted):
            result = own.run("reference")
        if not wanted:
            return (result,)
        return result.detach(), *torch.autograd.grad((result * cost.to(precision)).sum(), own.x)

    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    truth = run(torch.float64, True)
    for found, wanted in zip(run(dtype, True), truth, strict=True):
        assert error(found, wanted) < limit
    assert error(run(dtype, False)[0], truth[0]) < limit


def test_head_without_qk_channels_gives_the_mean_of_its_values() -> None:
    call = Maker(2).attention(2, 7, [0], [5]).to(torch.float64)
    mean = call.x.mean(1, keepdim=True).expand(-1, 7, -1)
    assert error(call.run("reference"), mean) < 1e-12


def test_qk_norm_is_layer_norm_on_each_head() -> None:
    maker = Maker(3)
    norms = maker.qk_norm(6)
    call = maker.attention(2, 7, [6, 6], [4, 4], eps=1e-3, **norms).to(torch.float64)
    qkv = call.x.clone()
    for start, name in ((0, "q"), (6, "q"), (12, "k"), (18, "k")):
        weight, bias = (norms[f"{name}_norm_{part}"].double() for part in ("weight", "bias"))
        qkv[..., start : start + 6] = F.layer_norm(qkv[..., start : start + 6], (6,), weight, bias, 1e-3)
    assert error(call.run("reference"), attention_longhand(qkv, [6, 6], [4, 4], 0.25)) < 1e-12


def test_attention_sublayer_is_its_parts_in_order() -> None:
    call = Maker(4).attention_sublayer(2, 7, 12, [4, 2], [3, 5], kept_in=9, kept_out=10).to(torch.float64)
    o = call.operator
    normed = F.layer_norm(call.x, (12,), o.norm_weight, o.norm_bias, 1e-6)[..., o.in_cols]
    heads = attention_longhand(normed @ o.qkv_weight.T + o.qkv_bias, [4, 2], [3, 5], 0.25)
    truth = call.x.clone()
    truth[..., o.out_cols] += (heads @ o.proj_weight.T + o.proj_bias) * o.layer_scale
    assert error(call.run("reference"), truth) < 1e-12
    assert error(replace(call, num_queries=3).run("reference"), truth[:, :3]) < 1e-12


def test_mlp_sublayer_is_its_parts_in_order() -> None:
    call = Maker(5).mlp_sublayer((2, 7), 12, 20, kept_in=9, kept_out=10, activation="relu").to(torch.float64)
    o = call.operator
    normed = F.layer_norm(call.x, (12,), o.norm_weight, o.norm_bias, 1e-6)[..., o.in_cols]
    hidden = (normed @ o.fc1_weight.T + o.fc1_bias).relu()
    truth = call.x.clone()
    truth[..., o.out_cols] += (hidden @ o.fc2_weight.T + o.fc2_bias) * o.layer_scale
    assert error(call.run("reference"), truth) < 1e-12


def test_packed_linear_leaves_zeros_in_pruned_outputs() -> None:
    call = Maker(6).linear((3,), 8, 5, 9, 4, "identity").to(torch.float64)
    result = call.run("reference")
    pruned = [c for c in range(9) if c not in call.operator.out_cols]
    assert torch.count_nonzero(result[:, pruned]) == 0
    truth = call.x[:, call.operator.in_cols] @ call.operator.weight.T + call.operator.bias
    assert error(result[:, call.operator.out_cols], truth) < 1e-12


@pytest.mark.parametrize("name", samples())
def test_gradients(name: str) -> None:
    call = samples()[name].to(torch.float64)
    for tensor in call.tensors():
        tensor.requires_grad_()
    inputs = call.tensors()

    def run(*_: Tensor) -> Tensor:
        return call.run("reference")

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
