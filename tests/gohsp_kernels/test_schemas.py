# SPDX-License-Identifier: Apache-2.0
"""Every operator is complete: schema, fake, reference, torch's opcheck, and one node in a traced graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import gohsp_kernels as gk
from gohsp_kernels import _native, _schemas, cpu, reference
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import Maker, error, samples

CPU_OPERATORS = [name for name in _schemas.NATIVE if name.startswith("cpu_")]  # the others: tests/gohsp_kernels/cuda
PACKING = ("cpu_pack", "cpu_plan")
needs_native = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)


def native_samples() -> dict[str, tuple[Any, ...]]:
    """Arguments of one call of each native operator."""
    maker, heads = Maker(1), ([8, 0, 6], [8, 3, 16])
    placed = {"rope": maker.rope(9, heads[0]), **maker.bias(3, 9, 2), **maker.cosine(3)}
    turned = maker.attention_sublayer(2, 9, 24, *heads, 17, 20, **placed, **maker.inner_norm(27, 48))
    gated = maker.mlp_sublayer((2, 9), 24, 40, 17, 20, **maker.gate(40, 17), **maker.inner_norm(40, 64))
    attention, x, _ = turned.described()
    mlp = gated.described()[0]
    chain = [cpu.pack_sublayer(sublayer, x.shape[-1]) for sublayer in (attention, mlp)]
    weight, bias = maker.weight(20, 17), maker.normal(20)
    words = torch.cat((placed["rope"].flatten(), maker.normal(2 * 3 * 9 * 16 + 3))).view(torch.int32)
    attended = torch.tensor([[8, 0, 6], [8, 3, 16]]), words, [0, 0, 9, 7, 2, 9, 1]
    plain = cpu.pack_linear(weight, bias)
    embedding = cpu.pack_embedding(maker.weight(20, 60).reshape(20, 3, 4, 5), bias, maker.normal(3, 20))
    return {
        "cpu_pack": (*reference.quantise_weight(weight), bias, _native.numbers("formats")["int8"]),
        "cpu_plan": (torch.tensor([1, 2, 30]), 40, True),
        "cpu_embed": (maker.normal(2, 3, 4, 10), embedding.panels, embedding.layout, embedding.base, [4, 5]),
        "cpu_linear": (maker.normal(3, 17), plain.panels, plain.layout, 20),
        "cpu_attention": (maker.normal(2, 9, 28 + 27), *attended, 0.2, 1e-6, 27, 9),
        "cpu_sublayers": (
            x,
            [s.panels for s in chain],
            [s.layout for s in chain],
            [c for s in chain for c in s.constants],
            5,
        ),
    }


SCHEMAS = {
    "packed_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? in_cols, Tensor? out_cols, int out_features, "
        "str activation) -> Tensor"
    ),
    "ragged_attention": (
        "(Tensor qkv, Tensor? q_norm_weight, Tensor? q_norm_bias, Tensor? k_norm_weight, Tensor? k_norm_bias, "
        "int[] qk_widths, int[] v_widths, float scale, float eps, int num_queries) -> Tensor"
    ),
    "attention_sublayer": (
        "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor? qkv_bias, "
        "Tensor proj_weight, Tensor? proj_bias, Tensor? layer_scale, Tensor? in_cols, Tensor? out_cols, "
        "Tensor? q_norm_weight, Tensor? q_norm_bias, Tensor? k_norm_weight, Tensor? k_norm_bias, "
        "int[] qk_widths, int[] v_widths, float scale, float eps, float qk_eps, int num_queries) -> Tensor"
    ),
    "mlp_sublayer": (
        "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
        "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? in_cols, Tensor? out_cols, "
        "str activation, float eps) -> Tensor"
    ),
}


def test_schemas_that_exported_programs_hold_stay_as_they_are() -> None:
    """What came later stands behind, with a default that means what was meant before."""
    assert _schemas.PUBLIC.keys() == SCHEMAS.keys()
    for name, schema in _schemas.PUBLIC.items():
        before = SCHEMAS[name].removesuffix(") -> Tensor")
        assert schema.startswith(before)
        added = schema.removeprefix(before).removesuffix(") -> Tensor").split(", ")[1:]
        assert all("=" in argument for argument in added)


@pytest.mark.parametrize("name", _schemas.PUBLIC)
def test_a_call_of_an_older_program_means_the_same(name: str) -> None:
    operator, x, queries = samples()[name].described()
    flat = operator.flat(queries)
    before = flat[: len(flat) - len(operator.added_names)]
    run = getattr(torch.ops.gohsp_kernels, name)
    assert torch.equal(run(x, *before), run(x, *flat))


@pytest.mark.parametrize("name", _schemas.PUBLIC)
def test_a_descriptor_goes_through_its_flat_form(name: str) -> None:
    operator, _, queries = samples()[name].described()
    again, asked = type(operator).from_flat(operator.flat(queries))
    assert asked == queries and type(again) is type(operator)
    assert all(a is b for a, b in zip(again.tensors, operator.tensors, strict=True))
    assert again.constants == operator.constants
    assert name == "ragged_attention" or any(operator.key is t for t in operator.tensors)


def test_every_operator_has_a_fake_a_reference_and_a_sample() -> None:
    assert set(_schemas._FAKES) == set(_schemas.SCHEMAS)
    assert set(samples()) == set(_schemas.PUBLIC)
    assert set(BACKENDS["reference"].operators) == set(_schemas.PUBLIC)
    assert all(set(backend.operators) <= set(_schemas.PUBLIC) for backend in BACKENDS.values())
    if _native.load():
        assert set(native_samples()) == set(CPU_OPERATORS)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("name", _schemas.PUBLIC)
def test_opcheck_public(name: str, backend: str) -> None:
    if name not in BACKENDS[backend].operators:
        pytest.skip(f"the backend {backend!r} has no {name}")
    with gk.use_backend(backend):
        opcheck(getattr(torch.ops.gohsp_kernels, name).default, samples()[name].flat())


@needs_native
@pytest.mark.parametrize("name", [n for n in CPU_OPERATORS if n not in PACKING])
def test_opcheck_native(name: str) -> None:
    opcheck(getattr(torch.ops.gohsp_kernels, name).default, native_samples()[name])


@needs_native
@pytest.mark.parametrize("name", PACKING)
def test_opcheck_pack(name: str) -> None:
    # Its true size is only known to the library, so it is left out of what compares fakes with results.
    checks = ("test_schema", "test_autograd_registration")
    opcheck(getattr(torch.ops.gohsp_kernels, name).default, native_samples()[name], test_utils=checks)


@pytest.mark.parametrize("tokens", [1, 127, 193])
@pytest.mark.parametrize("name", _schemas.PUBLIC)
def test_traced_call_is_one_node_and_right(name: str, tokens: int) -> None:
    maker = Maker(2)
    calls = {
        "packed_linear": lambda: maker.linear((tokens,), 24, 17, 32, 20, "gelu"),
        "ragged_attention": lambda: maker.attention(1, tokens, [8, 0, 5], [8, 3, 16]),
        "attention_sublayer": lambda: maker.attention_sublayer(1, tokens, 24, [8, 0, 5], [8, 3, 16], 17, 20),
        "mlp_sublayer": lambda: maker.mlp_sublayer((1, tokens), 24, 40, 17, 20),
    }
    call = calls.get(name, lambda: samples()[name])()
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call.bound(), backend=keep_graph, fullgraph=True)
    with torch.no_grad():
        result = compiled(call.x)
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [
        getattr(torch.ops.gohsp_kernels, name)
    ]
    assert error(result, call.truth()) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", _schemas.PUBLIC)
def test_traced_training_call_is_differentiable(name: str) -> None:
    call = samples()[name]
    x = call.x.clone().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(call.bound(), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    eager = call.x.clone().requires_grad_()
    call.with_x(eager).run().sum().backward()
    assert x.grad is not None and eager.grad is not None
    assert error(x.grad, eager.grad) < 1e-5
