# SPDX-License-Identifier: Apache-2.0
"""The reference against the definition written out longhand, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Maker, relative_error, samples

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
    assert relative_error(call.run("reference"), attention_longhand(call.args[0], qk, v, 0.25)) < 1e-12


def test_head_without_qk_channels_gives_the_mean_of_its_values() -> None:
    call = Maker(2).attention(2, 7, [0], [5]).to(torch.float64)
    mean = call.args[0].mean(1, keepdim=True).expand(-1, 7, -1)
    assert relative_error(call.run("reference"), mean) < 1e-12


def test_qk_norm_is_layer_norm_on_each_head() -> None:
    maker = Maker(3)
    norms = maker.qk_norm(6)
    call = maker.attention(2, 7, [6, 6], [4, 4], eps=1e-3, **norms).to(torch.float64)
    qkv = call.args[0].clone()
    for start, name in ((0, "q"), (6, "q"), (12, "k"), (18, "k")):
        weight, bias = (norms[f"{name}_norm_{part}"].double() for part in ("weight", "bias"))
        qkv[..., start : start + 6] = F.layer_norm(qkv[..., start : start + 6], (6,), weight, bias, 1e-3)
    assert relative_error(call.run("reference"), attention_longhand(qkv, [6, 6], [4, 4], 0.25)) < 1e-12


def test_attention_sublayer_is_its_parts_in_order() -> None:
    call = Maker(4).attention_sublayer(2, 7, 12, [4, 2], [3, 5], kept_in=9, kept_out=10).to(torch.float64)
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = call.args
    k = call.kwargs
    normed = F.layer_norm(x, (12,), norm_weight, norm_bias, 1e-6)[..., k["in_cols"]]
    heads = attention_longhand(normed @ qkv_weight.T + qkv_bias, [4, 2], [3, 5], 0.25)
    truth = x.clone()
    truth[..., k["out_cols"]] += (heads @ proj_weight.T + proj_bias) * k["layer_scale"]
    assert relative_error(call.run("reference"), truth) < 1e-12
    call.kwargs["num_queries"] = 3
    assert relative_error(call.run("reference"), truth[:, :3]) < 1e-12


def test_mlp_sublayer_is_its_parts_in_order() -> None:
    call = Maker(5).mlp_sublayer((2, 7), 12, 20, kept_in=9, kept_out=10, activation="relu").to(torch.float64)
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = call.args
    k = call.kwargs
    hidden = (F.layer_norm(x, (12,), norm_weight, norm_bias, 1e-6)[..., k["in_cols"]] @ fc1_weight.T + fc1_bias).relu()
    truth = x.clone()
    truth[..., k["out_cols"]] += (hidden @ fc2_weight.T + fc2_bias) * k["layer_scale"]
    assert relative_error(call.run("reference"), truth) < 1e-12


def test_packed_linear_leaves_zeros_in_pruned_outputs() -> None:
    call = Maker(6).linear((3,), 8, 5, 9, 4, "identity").to(torch.float64)
    result = call.run("reference")
    pruned = [c for c in range(9) if c not in call.kwargs["out_cols"]]
    assert torch.count_nonzero(result[:, pruned]) == 0
    truth = call.args[0][:, call.kwargs["in_cols"]] @ call.args[1].T + call.args[2]
    assert relative_error(result[:, call.kwargs["out_cols"]], truth) < 1e-12


@pytest.mark.parametrize("name", samples())
def test_gradients(name: str) -> None:
    call = samples()[name].to(torch.float64)
    for tensor in call.tensors():
        tensor.requires_grad_()
    inputs = call.tensors()

    def run(*_: Tensor) -> Tensor:
        return call.run("reference")

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
