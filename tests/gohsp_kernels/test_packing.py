# SPDX-License-Identifier: Apache-2.0
"""Packed weights: the algebra that is folded into them, and that they follow their parameters."""

from __future__ import annotations

import gc

import pytest
import torch

from gohsp_kernels import _native, _packing, cpu
from gohsp_kernels.testing import Call, Maker, error, samples

pytestmark = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)

SUBLAYERS = ("packed_linear", "attention_sublayer", "mlp_sublayer")


def is_true(call: Call) -> bool:
    return error(call.run("cpu"), call.truth()) < 2e-6


def count_packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    packed: list[int] = []
    original = cpu._panels

    def counting(*arguments: torch.Tensor | None) -> torch.Tensor:
        packed.append(1)
        return original(*arguments)

    monkeypatch.setattr(cpu, "_panels", counting)
    return packed


@pytest.mark.parametrize("name", SUBLAYERS)
def test_packed_once_and_again_after_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packings = count_packings(monkeypatch)
    call = samples()[name]
    call.run("cpu")
    first = len(packings)
    assert first > 0
    call.run("cpu")
    assert len(packings) == first
    for tensor in call.tensors()[1:]:
        before = len(packings)
        tensor.mul_(1.5)
        assert is_true(call)
        assert len(packings) == before + first


@pytest.mark.parametrize("name", SUBLAYERS)
def test_replaced_storage_is_noticed(name: str) -> None:
    call = samples()[name]
    weight = call.operator.key
    assert is_true(call)
    weight.data = weight.data.half().float()  # what module.half().float() does
    assert is_true(call)
    weight.data = weight.data * 2
    assert is_true(call)


def test_a_changed_layout_of_the_same_weights_is_noticed() -> None:
    call = Maker(3).attention_sublayer(2, 7, 16, [4, 8], [8, 4])
    assert is_true(call)
    call = call.but(qk_widths=(8, 4))
    assert is_true(call)
    assert is_true(call.but(scale=0.5))


def test_inference_tensors_are_never_stale() -> None:
    with torch.inference_mode():
        call = samples()["mlp_sublayer"]
        assert is_true(call)
        call.operator.key.mul_(2)
        assert is_true(call)


def test_packed_weights_go_with_their_parameters() -> None:
    call = samples()["mlp_sublayer"]
    gc.collect()
    before = len(cpu._cache._entries)
    call.run("cpu")
    assert len(cpu._cache._entries) == before + 1
    del call
    gc.collect()
    assert len(cpu._cache._entries) == before


def folded_attention(call: Call) -> Call:
    """The same sublayer with norm affine, softmax scale, biases and layer scale folded, for the reference."""
    o = call.operator
    n_qk = sum(o.qk_widths)
    weight, bias = _packing.fold_norm(o.qkv_weight, o.qkv_bias, o.norm_weight, o.norm_bias, o.in_cols)
    proj_bias = o.proj_bias + o.proj_weight @ bias[2 * n_qk :]
    bias[n_qk:] = 0
    weight[:n_qk] *= o.scale
    bias[:n_qk] *= o.scale
    proj_weight, proj_bias = _packing.fold_layer_scale(o.proj_weight, proj_bias, o.layer_scale)
    layers = {"qkv_weight": weight, "qkv_bias": bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    return call.but(norm_weight=None, norm_bias=None, scale=1.0, layer_scale=None, **layers)


def test_attention_algebra_is_exact() -> None:
    call = Maker(4).attention_sublayer(2, 9, 24, [8, 0, 5], [8, 3, 16], 17, 20).to(torch.float64)
    assert error(folded_attention(call).run("reference"), call.run("reference")) < 1e-14


def test_mlp_algebra_is_exact() -> None:
    call = Maker(5).mlp_sublayer((2, 9), 24, 40, 17, 20).to(torch.float64)
    o = call.operator
    fc1, fc1_constant = _packing.fold_norm(o.fc1_weight, o.fc1_bias, o.norm_weight, o.norm_bias, o.in_cols)
    fc2, fc2_constant = _packing.fold_layer_scale(o.fc2_weight, o.fc2_bias, o.layer_scale)
    layers = {"fc1_weight": fc1, "fc1_bias": fc1_constant, "fc2_weight": fc2, "fc2_bias": fc2_constant}
    folded = call.but(norm_weight=None, norm_bias=None, layer_scale=None, **layers)
    assert error(folded.run("reference"), call.run("reference")) < 1e-14


def test_k_bias_stays_with_qk_norm() -> None:
    maker = Maker(6)
    call = maker.attention_sublayer(2, 9, 24, [8, 8], [8, 8], **maker.qk_norm(8))
    assert is_true(call)
    with_bias = call.run("cpu")
    call.operator.qkv_bias[16:32] = 0
    assert error(call.run("cpu"), with_bias) > 1e-3
    assert is_true(call)


def test_panels_hold_every_weight_once_and_their_bias_first() -> None:
    weight, bias = torch.arange(1.0, 37 * 5 + 1).reshape(37, 5), -torch.arange(1.0, 38)
    panels = cpu.pack_linear(weight, bias).panels.view(torch.float32)
    nonzero = panels[panels != 0].sort().values
    assert torch.equal(nonzero, torch.cat([bias.sort().values, weight.flatten()]))
    assert panels[0] == bias[0] and panels[1] == bias[1]


@pytest.mark.parametrize("name", SUBLAYERS)
def test_weights_of_another_dtype_are_refused(name: str) -> None:
    call = samples()[name]
    with pytest.raises(ValueError, match=r"weights: wanted float32 on the cpu, as x; got torch\.float64 on cpu"):
        call.but(**{call.operator.key_name: call.operator.key.double()}).run("cpu")
