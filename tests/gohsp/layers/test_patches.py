# SPDX-License-Identifier: Apache-2.0
"""The patch embedding of a compressed model: a convolution on the CPU, on a GPU one product that gives the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import gohsp
import gohsp_kernels as gk
from gohsp.layers import FrozenEmbedding, PatchProjection, patches, project_patches
from tests.gohsp_kernels.graph_stand_in import stand_in

Make = Callable[..., Any]

# name -> channels and sides of the images, sides of a patch, bias
SHAPES: dict[str, tuple[int, int, int, tuple[int, int], bool]] = {
    "plain": (3, 48, 48, (16, 16), True),
    "no bias": (3, 28, 42, (14, 14), False),
    "grey, oblong patches": (1, 32, 64, (8, 16), True),
    "five channels, remainders": (5, 37, 50, (7, 3), True),
    "one patch": (3, 16, 16, (16, 16), True),
    "patches of one pixel": (4, 3, 5, (1, 1), False),
}

EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "any size": {"dynamic_img_size": True},
    "any size, padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "normalised": {"embed_norm_layer": nn.LayerNorm},
    "norm after": {"pre_norm": True},  # without a bias
    "oblong": {"img_size": (32, 64), "patch_size": (8, 16)},
    "grey": {"in_chans": 1},
}

WITH_PRODUCT = ["unfold", "unfold", "addmm"]


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Operators(TorchDispatchMode):
    """Notes the operators that tell a product from a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("unfold", "mm", "addmm") or "conv" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operators(module: Callable[[Tensor], object], x: Tensor) -> list[str]:
    with Operators() as noted:
        module(x)
    return noted.names


def compressed(model: nn.Module) -> Any:
    return gohsp.compress(model, gohsp.ModelMask.full(model))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a GPU: what would be a product there is one here."""
    monkeypatch.setattr(patches, "PRODUCT_ON", "cpu")


def convolution(name: str, dtype: torch.dtype) -> tuple[nn.Conv2d, Callable[[int], Tensor]]:
    channels, height, width, patch, bias = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, 24, patch, patch, bias=bias, dtype=dtype)

    def make(batch: int) -> Tensor:
        return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)

    return conv, make


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 4e-15)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_product_is_the_convolution(name: str, dtype: torch.dtype, tolerance: float, form: Any) -> None:
    conv, make = convolution(name, dtype)
    for module in (conv, copy.deepcopy(conv).to(memory_format=form)):
        for batch in (0, 1, 3):
            x = make(batch).to(memory_format=form)
            with torch.no_grad():
                wanted = F.conv2d(x.double(), conv.weight.double(), _double(conv.bias), stride=conv.stride)
                result = project_patches(x, module.weight, module.bias)
            assert result.shape == wanted.shape and result.dtype == dtype
            assert (result - wanted).norm() <= tolerance * wanted.norm()
    with torch.no_grad():  # and of an image alone
        torch.testing.assert_close(project_patches(x[0], conv.weight, conv.bias), conv(x[0]))


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def test_tokens_are_a_view_of_the_product() -> None:
    conv, make = convolution("plain", torch.float32)
    result = project_patches(make(2), conv.weight, conv.bias)
    tokens = result.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous() and tokens.data_ptr() == result.data_ptr()


@pytest.mark.parametrize("name", SHAPES)
def test_its_gradients_are_those_of_the_convolution(name: str, relative_error: Callable[..., float]) -> None:
    conv, make = convolution(name, torch.float64)
    x = make(2).requires_grad_()
    inputs = [x, *conv.parameters()]
    wanted = torch.autograd.grad(conv(x).sin().sum(), inputs)
    result = torch.autograd.grad(project_patches(x, conv.weight, conv.bias).sin().sum(), inputs)
    for ours, theirs in zip(result, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-14


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 3, 15, 48), torch.zeros(2, 3, 48, 15), torch.zeros(2, 4, 48, 48), torch.zeros(2, 3, 48, 48).half()],
)
def test_what_the_convolution_refuses_is_refused(make_model: Make, wrong: Tensor) -> None:
    proj = compressed(make_model().float()).patch_embed.proj
    for module in (proj, gohsp.densify(compressed(make_model().float())).patch_embed.proj):
        with pytest.raises(RuntimeError):
            module(wrong)


def fake_gpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for name, parameter in module.named_parameters():
        fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cuda"))
        module.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = fake
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_a_gpu_gets_the_product_and_a_cpu_the_convolution(make_model: Make, dtype: torch.dtype, training: bool) -> None:
    embed = compressed(make_model()).patch_embed.train(training)
    with torch.set_grad_enabled(training):
        assert operators(embed.to(dtype), torch.zeros(2, 3, 48, 48, dtype=dtype)) == ["convolution"]
        with FakeTensorMode():
            images = torch.empty(2, 3, 48, 48, dtype=dtype, device="cuda")
            assert operators(fake_gpu(embed, dtype), images) == WITH_PRODUCT
            tokens = embed(images)
    assert (tokens.shape, tokens.dtype, tokens.device.type) == ((2, 9, 192), dtype, "cuda")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_whole_models_with_the_product(name: str, make_model: Make, relative_error: Callable[..., float]) -> None:
    arguments = EMBEDDINGS[name]
    model = make_model(**arguments)
    small, embed = compressed(model), model.patch_embed
    sizes = [embed.img_size]
    if model.dynamic_img_size:
        sizes.append((41, 70) if embed.dynamic_img_pad else (80, 64))
    for size in sizes:
        x = torch.randn(2, embed.proj.in_channels, *size, dtype=torch.float64)
        assert operators(small.patch_embed, x) == ["unfold", "unfold", "mm" if embed.proj.bias is None else "addmm"]
        with torch.no_grad():
            assert relative_error(small(x), model(x)) < 1e-12
            assert relative_error(small.forward_features(x), model.forward_features(x)) < 1e-12


@pytest.mark.usefixtures("on_gpu")
def test_training_with_the_product(make_model: Make, images: Make, relative_error: Callable[..., float]) -> None:
    model = make_model().train()
    small, mine, theirs = compressed(model), images().requires_grad_(), images().requires_grad_()
    small(mine).square().sum().backward()
    model(theirs).square().sum().backward()
    assert relative_error(mine.grad, theirs.grad) < 1e-11
    for name, parameter in model.patch_embed.named_parameters():
        assert relative_error(small.patch_embed.get_parameter(name).grad, parameter.grad) < 1e-11


@pytest.mark.usefixtures("on_gpu")
def test_the_product_under_autocast(make_model: Make, images: Make, relative_error: Callable[..., float]) -> None:
    model, x = make_model().float(), images().float()
    small = compressed(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = small.patch_embed(x)
        assert result.dtype == torch.bfloat16
    assert relative_error(result, model.patch_embed(x)) < 5e-3


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", ["plain", "any size"])
def test_compile_and_export_with_the_product(
    name: str, make_model: Make, images: Make, relative_error: Callable[..., float]
) -> None:
    model = make_model(depth=1, **EMBEDDINGS[name]).float()
    small = compressed(model)
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=64)}
    if name == "any size":
        shapes[2] = 16 * torch.export.Dim("rows", min=2, max=20)
    torch.compiler.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        program = torch.export.export(small, (images().float(),), dynamic_shapes=(shapes,))
        for batch, side in ((2, 48), (5, 48 if name == "plain" else 80)):
            x = torch.randn(batch, 3, side, 48)
            assert relative_error(compiled(x), model(x)) < 1e-5
            assert relative_error(program.module()(x), model(x)) < 1e-5
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.unfold.default" in targets and not any("conv" in target for target in targets)


@pytest.mark.usefixtures("on_gpu")
def test_the_product_in_a_graph(make_model: Make, images: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    graphs = stand_in(monkeypatch)
    graphed = gk.GraphedModel(compressed(model).patch_embed)
    with torch.no_grad():
        for seed in range(3):
            torch.testing.assert_close(graphed(images(seed=seed)), model.patch_embed(images(seed=seed)))
    assert len(graphs) == 1


def test_count_is_the_same_for_the_product(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(patches, "PRODUCT_ON", "meta")  # where parts of a model are counted
    embed = compressed(model).to("meta").float().patch_embed
    assert operators(embed, torch.empty(1, 3, 48, 48, device="meta")) == WITH_PRODUCT
    assert gohsp.count(compressed(model)) == gohsp.count(model)


def test_the_convolution_keeps_what_it_has(make_model: Make) -> None:
    model = make_model()
    model.patch_embed.proj.note = "mine"
    model.patch_embed.proj.bias.requires_grad_(False)
    small = compressed(model)
    proj = small.patch_embed.proj
    assert type(proj) is PatchProjection and type(model.patch_embed.proj) is nn.Conv2d
    assert proj.note == "mine" and proj.weight.requires_grad and not proj.bias.requires_grad
    assert list(small.state_dict()) == list(model.state_dict())
    assert str(small.patch_embed) == str(model.patch_embed)
    for name, parameter in model.patch_embed.named_parameters():
        ours = small.patch_embed.get_parameter(name)
        assert torch.equal(ours, parameter) and ours.data_ptr() != parameter.data_ptr()
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(twin.patch_embed.proj) is PatchProjection
        assert torch.equal(twin.patch_embed.proj.weight, proj.weight)


def others() -> dict[str, nn.Module]:
    return {
        "overlapping": nn.Conv2d(3, 192, 18, 16, padding=1),
        "gaps": nn.Conv2d(3, 192, 12, 16),
        "padding": nn.Conv2d(3, 192, 16, 16, padding=(0, 7)),
        "padding by name": nn.Conv2d(3, 192, 16, 16, padding="valid"),
        "dilation": nn.Conv2d(3, 192, 8, 8, dilation=(2, 1)),
        "groups": nn.Conv2d(3, 192, 16, 16, groups=3),
        "subclass": Doubling(3, 192, 16, 16),
        "parametrized": parametrizations.weight_norm(nn.Conv2d(3, 192, 16, 16)),
        "three steps": nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 192, 4, 4)),
    }


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", others())
def test_other_projections_stay_as_they_are(name: str, make_model: Make, images: Make) -> None:
    model, x = make_model(), images()
    model.patch_embed.proj = others()[name].double()
    small = compressed(model)
    assert type(small.patch_embed.proj).__name__ == type(model.patch_embed.proj).__name__
    assert not isinstance(small.patch_embed.proj, PatchProjection)
    assert "unfold" not in operators(small.patch_embed, x)
    with torch.no_grad():
        torch.testing.assert_close(small.patch_embed(x), model.patch_embed(x), rtol=0, atol=0)


@pytest.mark.usefixtures("on_gpu")
def test_a_stride_that_is_set_afterwards_counts(make_model: Make, images: Make) -> None:
    """As code does that wants denser features of a finished model."""
    model, x = make_model(dynamic_img_size=True), images()
    small = compressed(model)
    for changed in (model, small):
        changed.patch_embed.proj.stride = (8, 8)
    assert model.patch_embed(x).shape == (2, 5, 5, 192)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


class Counting(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_computed_weight_is_computed_once(
    device: str, make_model: Make, images: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spectral norm, for one, takes a step whenever its weight is read."""
    monkeypatch.setattr(patches, "PRODUCT_ON", device)  # the images are on the CPU
    small, counting = compressed(make_model()), Counting()
    parametrize.register_parametrization(small.patch_embed.proj, "weight", counting)
    counting.calls = 0
    small(images())
    assert counting.calls == 1


class Linear(nn.Module):
    """An embedding of another make, without a projection of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.num_patches = nn.Linear(3 * 16 * 16, 192), 9

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(F.unfold(x, 16, stride=16).transpose(1, 2))


def test_an_embedding_of_another_make_stays(make_model: Make, images: Make) -> None:
    model, x = make_model(), images()
    model.patch_embed = Linear().double()
    small = compressed(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
        torch.testing.assert_close(gohsp.densify(small)(x), model(x))


def hooked(proj: Any) -> None:
    proj.register_forward_hook(lambda module, arguments, result: result * 1.5)
    proj.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))


def normed(proj: Any) -> None:
    weight_norm(proj).weight_g.mul_(2)


def parametrized(proj: Any) -> None:
    parametrizations.weight_norm(proj).parametrizations.weight.original0.mul_(2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "hooks": hooked,
    "prune": lambda proj: prune.l1_unstructured(proj, "weight", 0.5),
    "weight_norm of old": normed,
    "spectral_norm of old": lambda proj: spectral_norm(proj).eval(),
    "parametrization": parametrized,
    "forward replaced": lambda proj: setattr(proj, "forward", lambda x: x[:, :1, ::16, ::16].expand(-1, 192, -1, -1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_hangs_on_the_projection_works(name: str, before: bool, make_model: Make, images: Make) -> None:
    model, x = make_model(), images()
    small = compressed(model)
    with torch.no_grad():
        untouched = small(x)
        torch.manual_seed(0)  # spectral_norm starts from random vectors
        CHANGES[name](model.patch_embed.proj)
        if before:
            small = compressed(model)
        else:
            torch.manual_seed(0)
            CHANGES[name](small.patch_embed.proj)
        for ours in (small, gohsp.densify(small)):
            torch.testing.assert_close(ours(x), model(x))
        assert not torch.allclose(small(x), untouched)


def test_densify_gives_the_convolution_back(make_model: Make, images: Make) -> None:
    model, x = make_model(), images()
    small = compressed(model)
    plain = gohsp.densify(small)
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    assert type(plain.patch_embed) is PatchEmbed and type(plain.patch_embed.proj) is nn.Conv2d
    assert type(small.patch_embed.proj) is PatchProjection
    assert str(plain) == str(model) and list(plain.state_dict()) == list(model.state_dict())
    assert type(compressed(plain).patch_embed.proj) is PatchProjection
    with torch.no_grad():
        assert torch.equal(plain.patch_embed(x), model.patch_embed(x))


@pytest.mark.parametrize("patch", [None, 8])
def test_save_and_load(patch: int | None, make_model: Make, tmp_path: Path) -> None:
    """With another patch size timm puts a convolution of its own in place."""
    model = make_model().float()
    small = compressed(model)
    small.set_input_size(img_size=64, patch_size=patch)
    assert type(small.patch_embed.proj) is (PatchProjection if patch is None else nn.Conv2d)
    gohsp.save(small, tmp_path)
    loaded: Any = gohsp.load(tmp_path)
    assert type(loaded.patch_embed.proj) is PatchProjection
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


@pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)
@pytest.mark.parametrize("name", ["plain", "any size"])
def test_frozen_models_are_those_of_before(name: str, make_model: Make, images: Make) -> None:
    small, x = compressed(make_model(**EMBEDDINGS[name]).float()), images().float()
    frozen: Any = gohsp.freeze(small)
    assert isinstance(frozen.patch_embed, FrozenEmbedding if name == "plain" else PatchEmbed)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), small(x), rtol=1e-4, atol=1e-4)
