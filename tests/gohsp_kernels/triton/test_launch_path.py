# SPDX-License-Identifier: Apache-2.0
"""What a call costs beyond its launches: room for results, and nothing that a CUDA graph could not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import gohsp_kernels as gk
from gohsp_kernels.testing import Call, Maker, samples
from gohsp_kernels.triton import attention, config, linear, mlp
from gohsp_kernels.triton.attention_sublayer import pack_attention
from gohsp_kernels.triton.linear import PackedLinear
from gohsp_kernels.triton.mlp import PackedMlp, pack_mlp

pytestmark = pytest.mark.interpreter

ROOM = {"new_empty", "empty", "empty_like"}
ADDRESSES = {"view", "alias", "_unsafe_view", "reshape", "slice", "flatten", "unflatten", "as_strided"}
ONE_COPY = {"clone"}  # of the rows whose residual a class token's queries need

CALLS = {
    **samples(),
    "nothing pruned": Maker(1).attention_sublayer(2, 9, 24, [8, 8], [8, 8]),
    "class token": Maker(2).attention_sublayer(2, 9, 24, [8, 0], [8, 3], 17, 20, num_queries=1),
    "norms on q and k": Maker(3).attention_sublayer(2, 9, 24, [8, 8], [8, 3], **Maker(4).qk_norm(8)),
    "leading dimensions": Maker(5).mlp_sublayer((2, 3, 4), 24, 40),
}


class OnlyRoom(TorchDispatchMode):
    """Refuses every operation but those that allocate without filling or compute an address."""

    def __init__(self, also: set[str]) -> None:
        super().__init__()
        self.allowed = ROOM | ADDRESSES | also

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name in self.allowed or name == "prim::device", f"{name} in the launch path"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The launches, started out of sight of any mode: the interpreter is written with PyTorch."""
    noted: list[tuple[Any, ...]] = []

    def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **meta: Any) -> None:
        noted.append((kernel, programs, *arguments))
        if device.type == "cpu":
            with _disable_current_modes():
                kernel[(programs,)](*arguments, **meta)

    for module in (attention, linear, mlp):
        monkeypatch.setattr(module, "launch", launch)
    yield noted


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_only_launches(name: str, launches: list[tuple[Any, ...]]) -> None:
    call = CALLS[name]
    with torch.no_grad():
        first = call.run("triton")
        prepared = {tensor.data_ptr() for launch in launches for tensor in launch if isinstance(tensor, Tensor)}
        count = len(launches)
        launches.clear()
        with OnlyRoom(ONE_COPY if name == "class token" else set()):
            second = call.run("triton")
    assert torch.equal(first, second)
    assert len(launches) == count <= 3
    # Weights, biases, tables and column lists are those of the first call.
    constants = [t for launch in launches for t in launch[5:] if isinstance(t, Tensor) and t.dtype == torch.int32]
    assert all(tensor.data_ptr() in prepared for tensor in constants)


def test_the_guard_objects_to_a_read_back() -> None:
    with OnlyRoom(set()):
        for wrong in (lambda x: x.sum(), lambda x: x[0].item(), lambda x: torch.tensor([1])):
            with pytest.raises(AssertionError, match="in the launch path"):
                wrong(CALLS["packed_linear"].x)


def on_gpu(mode: FakeTensorMode, value: Any) -> Any:
    """``value`` with every tensor in it exchanged for a fake one on "cuda"."""
    if isinstance(value, Tensor):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    if isinstance(value, tuple):
        return tuple(on_gpu(mode, part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_gpu(mode, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@pytest.mark.parametrize("rows", [9, 64 * 197])
@pytest.mark.parametrize("name", ["attention_sublayer", "mlp_sublayer", "class token"])
def test_on_a_gpu_every_argument_of_a_launch_lies_there(
    name: str, rows: int, launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: a host that asked for one could not go on. In one launch and in two."""
    monkeypatch.setattr(config.Target, "of", lambda device: config.Target("cuda", 90, 132))
    call = Maker(6).mlp_sublayer((2, 9), 192, 40, 17, 20) if name == "mlp_sublayer" else CALLS[name]
    sublayer, x, queries = call.described()
    packed = (pack_mlp if name == "mlp_sublayer" else pack_attention)(sublayer, x.half())
    mode = FakeTensorMode()
    packed, x = on_gpu(mode, packed), on_gpu(mode, x.new_empty(1, rows, x.shape[-1]).half())
    with mode, OnlyRoom(ONE_COPY if name == "class token" else set()):
        result = packed(x) if isinstance(packed, PackedMlp) else packed(x, queries)
    assert isinstance(result, FakeTensor) and result.device.type == "cuda"
    assert len(launches) == (3 if name != "mlp_sublayer" else 2 if rows == 9 else 1)
    tensors = [tensor for launch in launches for tensor in launch if isinstance(tensor, Tensor)]
    assert all(isinstance(tensor, FakeTensor) and tensor.device.type == "cuda" for tensor in tensors)


def test_packed_parts_are_all_replaced() -> None:
    """For the test above: no tensor stays behind on the CPU."""
    call: Call = CALLS["norms on q and k"]
    packed = on_gpu(FakeTensorMode(), pack_attention(call.described()[0], torch.empty(0, 24).half()))
    assert isinstance(packed.proj, PackedLinear) and packed.proj.weight.device.type == "cuda"
    assert packed.norms[0].device.type == packed.layout.table.device.type == "cuda"


@pytest.mark.slow
def test_compile_sees_one_node_a_sublayer() -> None:
    attend, feed = (CALLS[name].bound() for name in ("attention_sublayer", "mlp_sublayer"))
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    def model(x: Tensor) -> Tensor:
        return feed(attend(x))

    x = CALLS["attention_sublayer"].x
    torch.compiler.reset()
    with gk.use_backend("triton"), torch.no_grad():
        result = torch.compile(model, backend=backend, fullgraph=True)(x)
        assert torch.equal(result, model(x))
    (graph,) = graphs
    calls = [node.target for node in graph.nodes if node.op.startswith("call")]
    operators = torch.ops.gohsp_kernels
    assert calls == [operators.attention_sublayer, operators.mlp_sublayer]
