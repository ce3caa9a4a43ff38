# SPDX-License-Identifier: Apache-2.0
"""A model that is not frozen answers from its present weights, by whatever way they were changed."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import timm.utils
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import gohsp
import gohsp_kernels as gk
from gohsp.layers import chain
from gohsp_kernels import _native

pytestmark = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)

Change = Callable[[nn.Module, Tensor], None]


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    dense = make_model().float()
    keep = {"heads": 0.7, "qk": 0.7, "v": 0.7, "hidden": 0.5}
    return gohsp.compress(dense, gohsp.ModelMask.random(dense, keep, torch.Generator().manual_seed(3)))


@pytest.fixture
def x(images: Callable[..., Tensor]) -> Tensor:
    return images().float()


def step_of(make: Callable[..., torch.optim.Optimizer], **arguments: Any) -> Change:
    """One step of an optimiser on a loss of the model's answers."""

    def change(model: nn.Module, x: Tensor) -> None:
        optimizer = make([p for p in model.parameters() if p.numel()], **arguments)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = model(x).square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    return change


def average(model: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9).add_(other(parameter.data), alpha=0.1)


def through_numpy(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        view *= 1.1


def through_dlpack(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        if parameter.numel():
            torch.from_dlpack(parameter.detach()).mul_(1.1)


def through_shared_memory(model: nn.Module, x: Tensor) -> None:
    model.share_memory()
    model(x)
    for parameter in model.parameters():
        if parameter.numel():
            torch.empty(0).set_(parameter.untyped_storage()).mul_(1.1)


def through_data(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.1)


def new_data(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def load_state(assign: bool) -> Change:
    def change(model: nn.Module, x: Tensor) -> None:
        model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=assign)

    return change


def swapped_in_and_out(model: nn.Module, x: Tensor) -> None:
    kept = [p.detach().clone() for p in model.parameters()]
    through_data(model, x)
    model(x)
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)  # takes another path through the library
    model(x)
    model.blocks[0].norm1._forward_hooks.clear()
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)


def stochastic_average(model: nn.Module, x: Tensor) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        averaged(x)
    step_of(torch.optim.SGD, lr=0.1)(model, x)
    averaged.update_parameters(model)
    step_of(torch.optim.SGD, lr=0.1)(model, x)
    averaged.update_parameters(model)
    with torch.no_grad():
        got = averaged(x)
        with gk.use_backend("reference"):
            assert torch.allclose(got, averaged(x), rtol=1e-4, atol=1e-5)


def model_average(model: nn.Module, x: Tensor) -> None:
    averaged = timm.utils.ModelEmaV3(model, decay=0.5)
    for _ in range(2):
        step_of(torch.optim.AdamW, lr=1e-2, fused=True)(model, x)
        averaged.update(model)
        with torch.no_grad():
            got = averaged.module(x)
            with gk.use_backend("reference"):
                assert torch.allclose(got, averaged.module(x), rtol=1e-4, atol=1e-5)


LR = {"lr": 1e-2}
OPTIMIZERS = {
    f"{name}{form and ', ' + form}": step_of(getattr(torch.optim, name), **LR, **({form: True} if form else {}))
    for name, forms in {
        "Adadelta": ("", "foreach"),
        "Adafactor": ("",),
        "Adagrad": ("", "foreach", "fused"),
        "Adam": ("", "foreach", "fused", "amsgrad"),
        "AdamW": ("", "foreach", "fused"),
        "Adamax": ("", "foreach"),
        "ASGD": ("", "foreach"),
        "LBFGS": ("",),
        "NAdam": ("", "foreach"),
        "RAdam": ("", "foreach"),
        "RMSprop": ("", "foreach"),
        "Rprop": ("", "foreach"),
        "SGD": ("", "foreach", "fused"),
    }.items()
    for form in forms
}
WAYS: dict[str, Change] = {
    **OPTIMIZERS,
    "Lion": step_of(timm.optim.Lion, lr=1e-2),
    "timm adamw": lambda model, x: step_of(lambda _, **k: timm.optim.create_optimizer_v2(model, "adamw", **k), **LR)(
        model, x
    ),
    "vector_to_parameters": lambda model, x: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) * 1.1, model.parameters()
    ),
    "average of .data": lambda model, x: average(model, torch.zeros_like),
    ".data.copy_": through_data,
    ".data = ": new_data,
    "numpy": through_numpy,
    "DLPack": through_dlpack,
    "shared memory": through_shared_memory,
    "load_state_dict": load_state(assign=False),
    "load_state_dict(assign)": load_state(assign=True),
    "swapped in and out": swapped_in_and_out,
    "stochastic average": stochastic_average,
    "model average": model_average,
}


def assert_current(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """Compare with the definition in plain PyTorch, on a copy that nothing can have been kept for."""
    with torch.no_grad():
        got = run(x)
        with gk.use_backend("reference"):
            wanted = copy.deepcopy(model)(x)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    return got


@pytest.mark.parametrize("way", WAYS)
def test_a_compressed_model_sees_its_own_training(way: str, model: Any, x: Tensor) -> None:
    before = assert_current(model, model, x)
    WAYS[way](model, x)
    after = assert_current(model, model, x)
    if way != "swapped in and out":
        assert float((after - before).norm() / before.norm()) > 1e-3


SOME_WAYS = ["AdamW, fused", "SGD, fused", "average of .data", "numpy", ".data = ", "load_state_dict(assign)"]


@pytest.mark.slow
@pytest.mark.parametrize("way", SOME_WAYS)
def test_a_compiled_model_sees_them(way: str, model: Any, x: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_current(compiled, model, x)
    WAYS[way](model, x)
    assert_current(compiled, model, x)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["AdamW, fused", "average of .data", "numpy"])
def test_an_exported_model_that_shares_its_parameters_sees_them(way: str, model: Any, x: Tensor) -> None:
    exported = torch.export.export(model, (x,)).module()
    for name, parameter in exported.named_parameters():
        parameter.data = model.get_parameter(name).data
    assert_current(exported, model, x)
    WAYS[way](model, x)
    assert_current(exported, model, x)


@pytest.mark.parametrize("way", SOME_WAYS)
def test_what_is_frozen_after_them_has_them(way: str, model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model(x)
    WAYS[way](model, x)
    assert_current(gohsp.freeze(model), model, x)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


PEER = """
import copy, sys, timm, torch, torch.distributed as dist, gohsp, gohsp_kernels as gk
rank, meet = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
torch.manual_seed(rank)
dense = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5).eval()
model = gohsp.compress(dense, gohsp.ModelMask.full(dense))
x = torch.ones(1, 3, 48, 48).cumsum(-1) / 48

def share(collective):
    model(x)
    for parameter in model.parameters():
        collective(parameter)
    seen = model(x)
    with gk.use_backend("reference"):
        wanted = copy.deepcopy(model)(x)
    return float((seen - wanted).norm() / wanted.norm())

def mean(parameter):
    dist.all_reduce(parameter)
    parameter.data.div_(2)

def anew(collective):
    torch.manual_seed(7 + rank)
    model.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()})
    return share(collective)

with torch.no_grad():
    errors = [share(lambda p: dist.broadcast(p, 0)), anew(lambda p: dist.broadcast(p.data, 0)), anew(mean)]
print(max(errors) < 1e-4, errors)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_what_comes_from_another_process_is_seen(tmp_path: Path) -> None:
    """Broadcast of parameters and of their data, and all_reduce, as federated and data-parallel loops write them."""
    start = [sys.executable, "-c", PEER]
    peers = [
        subprocess.Popen([*start, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [peer.communicate(timeout=120)[0] for peer in peers]
    assert all(text.startswith("True") for text in told), told


@pytest.mark.usefixtures("alone")
def test_a_model_under_ddp_is_current(model: Any, x: Tensor) -> None:
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert_current(ddp, model, x)
    step_of(torch.optim.AdamW, lr=1e-2, fused=True)(ddp, x)
    assert_current(ddp, model, x)


class Doubled(nn.Module):
    """A parametrization with a parameter of its own, as LoRA by parametrize has."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight.shape[1]) * 0.1)
        self.up = nn.Parameter(torch.randn(weight.shape[0], 2) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled(layer.weight)),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", COMPUTED)
def test_weights_that_are_computed_from_others_are_followed(way: str, training: bool, model: Any, x: Tensor) -> None:
    assert_current(model, model, x)
    twin = copy.deepcopy(model)
    for block in model.blocks:
        for layer in (block.attn.qkv, block.mlp.fc2):
            COMPUTED[way](layer)
    model.train(training)
    with torch.no_grad():
        first = model(x)
        for _ in range(2):
            for name, parameter in model.named_parameters():
                if "qkv" in name or "fc2" in name:
                    parameter.mul_(1.2)
            second = model(x)
            for name, parameter in twin.named_parameters():
                path, _, last = name.rpartition(".")
                parameter.copy_(computed(model.get_submodule(path), last))
            with gk.use_backend("reference"):
                wanted = copy.deepcopy(twin)(x)
            assert float((second - wanted).norm() / wanted.norm()) < 1e-4
    assert float((second - first).norm() / first.norm()) > 1e-3


def computed(layer: Any, name: str) -> Tensor:
    """What the layer's weight is by the definition of the tool that computes it."""
    if name == "weight" and hasattr(layer, "weight_orig"):
        return layer.weight_orig * layer.weight_mask
    if name == "weight" and hasattr(layer, "weight_g"):
        return layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))
    value: Tensor = getattr(layer, name)
    return value


def test_a_parametrized_norm_is_followed(model: Any, x: Tensor) -> None:
    twin = copy.deepcopy(model)
    parametrize.register_parametrization(model.blocks[0].norm1, "weight", Scaled())
    with torch.no_grad():
        model(x)
        model.blocks[0].norm1.parametrizations.weight[0].factor.mul_(3)
        twin.blocks[0].norm1.weight.mul_(3)
    assert_current(model, twin, x)


class Scaled(nn.Module):
    """A factor on a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_layers_without_bias_run_as_one_chain(make_model: Callable[..., Any], x: Tensor) -> None:
    dense = make_model(qkv_bias=False).float()
    small = gohsp.compress(dense, gohsp.ModelMask.full(dense))
    assert_current(small, small, x)
    assert chain._chains[small.blocks].is_whole()
