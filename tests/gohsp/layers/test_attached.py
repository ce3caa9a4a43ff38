# SPDX-License-Identifier: Apache-2.0
"""What hangs on a user's model is kept or refused by name, and what the library hands out cannot change it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import gohsp
from gohsp_kernels import _native

Make = Callable[..., Any]


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Adapted(nn.Module):
    """A wrapper as adapters have it, without the attributes of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


def doubling(layer: nn.Linear) -> nn.Linear:
    result = Doubling(layer.in_features, layer.out_features)
    result.load_state_dict(layer.state_dict())
    return result.to(layer.weight.dtype)


PLACES = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
PATHS = [f"{part}.{name}" for part, names in PLACES.items() for name in names]


def refused(model: Any, message: str) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        gohsp.compress(model, gohsp.ModelMask.full(model))
    with pytest.raises(ValueError, match=message):
        gohsp.rank_heads(model, [torch.zeros(1, 3, 48, 48).double()])
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("wrap", [doubling, Adapted])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_a_linear_layer_is_refused(path: str, wrap: Callable[..., nn.Module], make_model: Make) -> None:
    model = make_model()
    block = model.blocks[1]
    part, name = path.split(".")
    setattr(getattr(block, part), name, wrap(block.get_submodule(path)))
    refused(model, rf"blocks\.1: {path} is .*test_attached\.\w+; wanted torch\.nn\.Linear\. Adapters are merged first")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    ("compute", "way_out"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove\(module, 'weight'\)"),
        (weight_norm, r"remove_weight_norm\(module\)"),
        (parametrizations.weight_norm, r"parametrize\.remove_parametrizations\(module, 'weight'\)"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_computed_weight_is_refused_with_the_way_out(
    path: str, compute: Callable[[nn.Module], object], way_out: str, make_model: Make
) -> None:
    model = make_model()
    compute(model.blocks[0].get_submodule(path))
    refused(model, rf"blocks\.0: the weight of {path} is computed .* call .*{way_out}")


@pytest.mark.parametrize("path", ["", "attn", "mlp", "norm1", "mlp.act", *PATHS])
def test_a_replaced_forward_is_refused(path: str, make_model: Make) -> None:
    model = make_model()
    module = model.blocks[1].get_submodule(path)
    module.forward = lambda x, **_: x
    refused(model, rf"blocks\.1: forward of {path or 'the block'} was replaced on the object")


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("path", ["", "attn", "mlp", "mlp.act", "attn.attn_drop", *PATHS])
def test_a_hook_on_what_is_replaced_is_refused(path: str, register: str, make_model: Make) -> None:
    model = make_model()
    handle = getattr(model.blocks[1].get_submodule(path), f"register_{register}")(lambda *_: None)
    where = f"blocks.1.{path}".rstrip(".")
    with pytest.raises(ValueError, match=f"a hook hangs on {where}, which compress replaces; wanted none. Remove it"):
        gohsp.compress(model, gohsp.ModelMask.full(model))
    with pytest.raises(ValueError, match=f"a hook hangs on {where}"):
        gohsp.prune(model, [torch.zeros(1, 3, 48, 48).double()], {"params": 0.9})
    handle.remove()
    gohsp.compress(model, gohsp.ModelMask.full(model))


@pytest.mark.parametrize("path", ["blocks.0.norm1", "patch_embed", "norm", ""])
def test_other_hooks_are_kept(path: str, make_model: Make, images: Make) -> None:
    model, x = make_model(), images()
    model.get_submodule(path).register_forward_hook(lambda module, arguments, result: result * 1.5)
    small = gohsp.compress(model, gohsp.ModelMask.full(model))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


# timm's fused attention does not call attn_drop, and neither do we.
INSIDE = ("norm1", "attn", "attn.q_norm", "attn.proj_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.drop1", "ls2")


@pytest.fixture
def small(make_model: Make) -> Any:
    """A compressed model with all that a block can have, in which no module computes nothing."""
    dense = make_model(qk_norm=True, init_values=1.0).float()
    keep = {"heads": 0.7, "v": 0.7, "hidden": 0.5, "attn_in": 0.8, "attn_out": 0.8, "mlp_in": 0.8, "mlp_out": 0.8}
    return gohsp.compress(dense, gohsp.ModelMask.random(dense, keep, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("by_chain", [True, False])
@pytest.mark.parametrize("path", [*INSIDE, *PATHS])
def test_hooks_in_a_compressed_block_are_called(path: str, by_chain: bool, small: Any, images: Make) -> None:
    """Whatever module they hang on, and whether or not the model has been called before."""
    x = images().float()
    module = small.blocks[1].get_submodule(path)
    with torch.no_grad():
        before = small(x) if by_chain else None
        calls: list[str] = []
        handle = module.register_forward_hook(lambda *_: calls.append(path))
        watched = small(x)
        assert calls and (len(calls) == 1 or path == "attn.q_norm")  # which is called head by head
        handle.remove()
        torch.testing.assert_close(small(x), watched, rtol=1e-3, atol=1e-4)
        if before is not None:
            torch.testing.assert_close(before, watched, rtol=1e-3, atol=1e-4)
        module.register_forward_hook(lambda _, arguments, result: result * 0.5)
        assert float((small(x) - watched).norm() / watched.norm()) > 1e-3


class LowRank(nn.Module):
    """An adapter around one of the cut layers."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        rows, columns = base.weight.shape
        self.down = nn.Parameter(torch.randn(2, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.randn(rows, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_an_adapter_in_a_compressed_block_is_called(path: str, training: bool, small: Any, images: Make) -> None:
    x = images().float()
    merged = copy.deepcopy(small).train(training)
    with torch.no_grad():
        small.train(training)(x)
        part, name = path.split(".")
        adapter = LowRank(small.blocks[1].get_submodule(path))
        setattr(getattr(small.blocks[1], part), name, adapter)
        merged.blocks[1].get_submodule(path).weight += adapter.up @ adapter.down
        torch.testing.assert_close(small(x), merged(x), rtol=1e-3, atol=1e-4)
        setattr(getattr(small.blocks[1], part), name, adapter.base)
        assert not torch.allclose(small(x), merged(x), rtol=1e-2)
    setattr(getattr(small.blocks[1], part), name, adapter)
    small(x).square().sum().backward()
    assert adapter.up.grad is not None and float(adapter.up.grad.norm()) > 0
    for cast in (gohsp.densify, gohsp.freeze):
        with pytest.raises(ValueError, match=rf"blocks\.1: {path} is .*LowRank, with code of its own"):
            cast(small)


@pytest.mark.parametrize("path", [*INSIDE, *PATHS])
def test_a_forward_of_its_own_in_a_compressed_block_is_called(path: str, small: Any, images: Make) -> None:
    x = images().float()
    module = small.blocks[1].get_submodule(path)
    with torch.no_grad():
        before = small(x)
        own = type(module).forward
        module.forward = lambda *arguments, **keywords: own(module, *arguments, **keywords) * 0.5
        assert float((small(x) - before).norm() / before.norm()) > 1e-3
        del module.forward
        torch.testing.assert_close(small(x), before)


@pytest.mark.parametrize("path", ["", *INSIDE, *PATHS])
def test_hooks_are_refused_where_their_modules_go(path: str, small: Any) -> None:
    handle = small.blocks[1].get_submodule(path).register_forward_hook(lambda *_: None)
    for cast in (gohsp.densify, gohsp.freeze):
        with pytest.raises(ValueError, match=rf"blocks\.1: a hook hangs on {path or 'the block'}, which would be lost"):
            cast(small)
    handle.remove()
    gohsp.densify(small)


@pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
@pytest.mark.parametrize("path", ["patch_embed", "patch_embed.proj", "head", "norm", "pos_drop"])
def test_a_frozen_model_calls_the_hooks_around_its_blocks(path: str, small: Any, images: Make) -> None:
    small.get_submodule(path).register_forward_hook(lambda module, arguments, result: result * 1.5)
    x = images().float()
    with torch.no_grad():
        torch.testing.assert_close(gohsp.freeze(small)(x), small(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    ("compute", "way_out"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove\(module, 'weight'\) or .*"),
        (weight_norm, r"remove_weight_norm\(module\)"),
        (parametrizations.weight_norm, r"parametrize\.remove_parametrizations\(module, 'weight'\)"),
    ],
)
def test_computed_weights_are_frozen_as_they_are_and_not_made_plain(
    compute: Callable[[nn.Module], object], way_out: str, small: Any, images: Make
) -> None:
    x = images().float()
    compute(small.blocks[1].mlp.fc1)
    with torch.no_grad():
        small(x)
        for name, parameter in small.blocks[1].mlp.fc1.named_parameters():
            if name in ("weight_orig", "weight_g", "parametrizations.weight.original0"):
                parameter.mul_(1.5)
        if _native.load():
            frozen = gohsp.freeze(small)
            torch.testing.assert_close(frozen(x), small(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=rf"blocks\.1 plain: the weight of mlp\.fc1 is computed .*{way_out} first"):
        gohsp.densify(small)


@pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
def test_a_frozen_model_and_its_model_do_not_reach_each_other(make_model: Make, images: Make) -> None:
    dense, x = make_model(drop_rate=0.1).float(), images().float()
    small = gohsp.compress(dense, gohsp.ModelMask.full(dense)).train()
    state = copy.deepcopy(small.state_dict())
    frozen = gohsp.freeze(small)
    assert all(module.training for module in small.modules())
    assert not any(module.training for module in frozen.modules())
    with torch.no_grad():
        before = frozen(x)
        for parameter in small.parameters():
            parameter.mul_(1.5)
        assert torch.equal(frozen(x), before)
        small.load_state_dict(state)
    frozen.requires_grad_(False)
    for tensor in (*frozen.parameters(), *frozen.buffers()):
        tensor.data.zero_()
    frozen.half()
    frozen.register_forward_hook(lambda *_: None)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in small.parameters())
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    assert not small._forward_hooks


def test_densify_with_norms_on_q_and_k_keeps_a_scale_of_its_own(make_model: Make, images: Make) -> None:
    dense, x = make_model(qk_norm=True), images()
    for block in dense.blocks:
        block.attn.fused_attn, block.attn.scale = False, 0.3
    small = gohsp.compress(dense, gohsp.ModelMask.full(dense))
    with torch.no_grad():
        torch.testing.assert_close(gohsp.densify(small)(x), dense(x))


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """New tensors are on meta, as with ``torch.set_default_device("cuda")`` on a GPU, unless a device is named."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
def test_a_default_device_does_not_reach_masks_files_and_kernels(tmp_path: Path, make_model: Make) -> None:
    with torch.device("cpu"):
        dense, x = make_model().float(), torch.randn(2, 3, 48, 48)
    mask = gohsp.ModelMask.full(dense)
    mask.blocks[0].heads[1] = False
    small = gohsp.compress(dense, mask)
    with torch.no_grad():
        wanted = small(x)
        assert wanted.device.type == "cpu"
        torch.testing.assert_close(gohsp.freeze(small)(x), wanted)
        mask.save(tmp_path / "mask.json")
        again = gohsp.compress(dense, gohsp.ModelMask.load(tmp_path / "mask.json"))
        torch.testing.assert_close(again(x), wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_default_device_does_not_reach_pruning_and_loading(tmp_path: Path, make_model: Make) -> None:
    with torch.device("cpu"):
        dense, x = make_model().float(), torch.randn(4, 3, 48, 48)
    result = gohsp.prune(dense, [x], {"params": 0.7}, refine=1)
    small = gohsp.compress(result.model, result.mask)
    gohsp.save(small, tmp_path / "model.safetensors")
    loaded = gohsp.load(tmp_path / "model.safetensors")
    assert all(tensor.device.type == "cpu" for tensor in (*loaded.parameters(), *loaded.buffers()))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), small(x))
