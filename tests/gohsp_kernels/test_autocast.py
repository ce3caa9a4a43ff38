# SPDX-License-Identifier: Apache-2.0
"""Calls under torch.autocast: dtypes and numbers as of the same block written in plain PyTorch, gradients, caches."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import cuda, dispatch
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import Maker, error, samples

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS, WIDTH, FEATURES, HIDDEN = 2, 8, 24, 32
NEAR = {BF16: 2e-2, FP16: 3e-3}
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


class Block:
    """The weights of a block, and the block as timm writes it."""

    def __init__(self) -> None:
        m, channels = Maker(5), HEADS * WIDTH
        self.x = m.normal(2, 9, FEATURES)
        self.norm = m.normal(FEATURES), m.normal(FEATURES)
        self.qkv = m.weight(3 * channels, FEATURES), m.normal(3 * channels)
        self.proj = m.weight(FEATURES, channels), m.normal(FEATURES)
        self.fc1 = m.weight(HIDDEN, FEATURES), m.normal(HIDDEN)
        self.fc2 = m.weight(FEATURES, HIDDEN), m.normal(FEATURES)

    def parameters(self) -> list[Tensor]:
        return [*self.norm, *self.qkv, *self.proj, *self.fc1, *self.fc2]

    def plain(self, x: Tensor) -> Tensor:
        qkv = F.linear(F.layer_norm(x, (FEATURES,), *self.norm, 1e-6), *self.qkv)
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(heads, *self.proj)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (FEATURES,), *self.norm, 1e-6), *self.fc1)), *self.fc2)

    def sublayers(self) -> list[partial[Tensor]]:
        widths, scale = (WIDTH,) * HEADS, WIDTH**-0.5
        norm = dict(zip(("norm_weight", "norm_bias"), self.norm, strict=True))
        names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
        first = dict(zip(names, (*self.qkv, *self.proj), strict=True), qk_widths=widths, v_widths=widths, scale=scale)
        second = dict(zip(("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), (*self.fc1, *self.fc2), strict=True))
        return [partial(gk.attention_sublayer, **norm, **first), partial(gk.mlp_sublayer, **norm, **second)]

    def sublayer_by_sublayer(self, x: Tensor, backend: str | None = None) -> Tensor:
        for sublayer in self.sublayers():
            x = sublayer(x, backend=backend)
        return x


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels, for tensors on the CPU, in place of a GPU."""
    pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")
    monkeypatch.setattr(BACKENDS["cuda"], "missing", lambda _: "")


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_block_as_in_plain_pytorch(block: Block, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype), torch.no_grad():
        expected = block.plain(block.x)
        for result in (block.sublayer_by_sublayer(block.x), gk.SublayerChain(block.sublayers())(block.x)):
            assert result.dtype == expected.dtype == FP32
            assert error(result, expected) < 1e-3  # the same operations in another order
    with torch.no_grad():
        assert error(expected, block.plain(block.x)) > 1e-4  # autocast did round something


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_are_those_of_plain_pytorch(block: Block, dtype: torch.dtype) -> None:
    def gradients(function: Any) -> list[Tensor]:
        leaves = [block.x, *block.parameters()]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.autocast("cpu", dtype):
            loss = function(block.x).square().mean()
        return list(torch.autograd.grad(loss, leaves))

    expected, got = gradients(block.plain), gradients(block.sublayer_by_sublayer)
    assert all(g.dtype == FP32 for g in got)
    for mine, theirs in zip(got, expected, strict=True):
        assert error(mine, theirs) < NEAR[dtype]


@pytest.mark.parametrize("name", ["packed_linear", "ragged_attention"])
def test_results_without_a_residual_have_the_dtype_of_autocast(name: str) -> None:
    call = samples()[name]
    with torch.autocast("cpu", BF16), torch.no_grad():
        assert call.run().dtype == BF16
        assert call.to(torch.float64).run().dtype == torch.float64  # which autocast leaves alone
    with torch.no_grad():
        assert call.run().dtype == FP32


@needs_cpu
def test_the_backend_is_chosen_by_the_dtype_of_autocast(
    block: Block, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_already_logged", set())
    sublayer = block.sublayers()[1]
    with torch.autocast("cpu", BF16), torch.no_grad():
        with caplog.at_level(logging.INFO, logger="gohsp_kernels"):
            sublayer(block.x)
        assert "backend 'cpu' passed over: runs in float32; got torch.bfloat16" in caplog.messages
        for call in (sublayer, gk.SublayerChain([sublayer])):
            with pytest.raises(RuntimeError, match=r"backend 'cpu': runs in float32; got torch\.bfloat16"):
                call(block.x, backend="cpu")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_kernels_run_in_the_dtype_of_autocast(block: Block, dtype: torch.dtype) -> None:
    chain = gk.SublayerChain(block.sublayers())
    with torch.no_grad():
        inside = block.sublayer_by_sublayer(block.x.to(dtype), "cuda")
        expected = block.plain(block.x)
    with torch.autocast("cpu", dtype), torch.no_grad():
        result, whole = block.sublayer_by_sublayer(block.x, "cuda"), chain(block.x, backend="cuda")
        linear = gk.packed_linear(block.x, *block.qkv, backend="cuda")
    assert result.dtype == whole.dtype == FP32 and linear.dtype == inside.dtype == dtype
    assert torch.equal(result, inside.float()) and torch.equal(whole, inside.float())  # nothing but x is rounded
    assert 1e-5 < error(result, expected) < NEAR[dtype]


@pytest.mark.usefixtures("emulated")
def test_packed_weights_are_kept_from_call_to_call(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    packings: list[torch.dtype] = []
    pack = cuda.pack_mlp
    monkeypatch.setitem(cuda._PACK, "mlp_sublayer", lambda sublayer, x: packings.append(x.dtype) or pack(sublayer, x))
    sublayer = block.sublayers()[1]
    with torch.no_grad():
        with torch.autocast("cpu", FP16):
            first, second = sublayer(block.x, backend="cuda"), sublayer(block.x, backend="cuda")
        assert packings == [FP16] and torch.equal(first, second)
        outside = sublayer(block.x, backend="cuda")
    assert packings == [FP16, FP32] and not torch.equal(outside, first)


@needs_cpu
def test_a_frozen_chain_keeps_its_own_precision(block: Block) -> None:
    frozen = gk.SublayerChain(block.sublayers()).frozen(FEATURES)
    with torch.no_grad():
        expected = frozen(block.x)
        with torch.autocast("cpu", BF16):
            assert torch.equal(frozen(block.x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_calls_follow_autocast(block: Block, inside: bool) -> None:
    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return block.sublayer_by_sublayer(x), gk.packed_linear(x, *block.qkv)

    def with_autocast(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", BF16):
            return call(x)

    torch._dynamo.reset()
    compiled = torch.compile(with_autocast if inside else call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = with_autocast(block.x)
        with torch.autocast("cpu", BF16, enabled=not inside):
            got = compiled(block.x)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        if not inside:
            assert compiled(block.x)[1].dtype == FP32


@pytest.mark.parametrize("name", ["packed_linear", "mlp_sublayer", "attention_sublayer", "ragged_attention"])
def test_a_graph_node_takes_float32_parameters_in_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph that was traced for a GPU under autocast calls: its result has the dtype of x wherever it runs."""
    call = samples()[name]
    x, *rest = call.flat()
    node = getattr(torch.ops.gohsp_kernels, name)
    with torch.no_grad():
        expected = node(x, *rest)
        results = [node(x.to(BF16), *rest)]
        with torch.autocast("cpu", BF16):
            results.append(node(x.to(BF16), *rest))
            assert node(x, *rest).dtype == FP32  # the fake says so
    for result in results:
        assert result.dtype == BF16
        assert error(result, expected) < 3e-2
    assert torch.equal(*results)
