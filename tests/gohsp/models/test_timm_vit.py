# SPDX-License-Identifier: Apache-2.0
"""What gohsp knows of timm: refusals, sizes, activations, and when the last block computes the class token only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GELU, AttentionPoolLatent, GatedMlp, GELUTanh, QuickGELU, RmsNorm, RmsNormFp32
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.layers import PrunedBlock
from gohsp.masks.mask import ModelMask
from gohsp.models import timm_parts
from gohsp.models.base import Geometry
from gohsp.models.registry import family_of, geometry_of, open_model
from gohsp.training.losses import watch


def small(**arguments: Any) -> VisionTransformer:
    return VisionTransformer(
        **{"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5} | arguments
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_mlp_norm": True, "norm_layer": RmsNormFp32}, "norm1 is RmsNormFp32; wanted LayerNorm or RMSNorm"),
        ({"block_fn": ParallelScalingBlock}, "wanted timm's Block or ResPostBlock, got ParallelScalingBlock"),
        ({"mlp_layer": GatedMlp}, "mlp is GatedMlp; wanted timm's Mlp, GluMlp, GeGluMlp or SwiGLU"),
        ({"act_layer": nn.Hardswish}, "activation Hardswish; known are gelu, gelu_tanh"),
        ({"attn_layer": "diff"}, "attn is DiffAttention"),
    ],
)
def test_refusal_gives_the_block_and_the_reason(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"model: cannot prune blocks\.0: .*" + message):
        open_model(small(**arguments))


def test_refusal_of_single_blocks_that_were_changed() -> None:
    def refused(change: Callable[[Any], None], message: str) -> None:
        model = small(qk_norm=True)
        change(model.blocks[1])
        with pytest.raises(ValueError, match=r"cannot prune blocks\.1: .*" + message):
            open_model(model)

    refused(lambda block: setattr(block.attn, "gate", nn.Linear(24, 24)), "gated attention")
    refused(lambda block: setattr(block.attn, "proj", nn.Linear(24, 25)), "attention writes 25 features")
    refused(lambda block: setattr(block.mlp, "fc2", nn.Linear(96, 25)), "MLP writes 25 features")
    refused(
        lambda block: setattr(block.mlp, "fc1", nn.Conv2d(24, 96, 1)),
        r"mlp\.fc1 is torch\.nn\.modules\.conv\.Conv2d; wanted torch\.nn\.Linear",
    )
    refused(lambda block: setattr(block.attn, "q_norm", nn.Identity()), "a norm on q or on k alone")
    refused(lambda block: setattr(block.attn, "norm", RmsNorm(24)), "attn.norm are norms of different kinds")
    refused(lambda block: setattr(block.attn.k_norm, "eps", 1e-3), "q and k norms of different eps")
    refused(
        lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(8, elementwise_affine=False)),
        "attn.q_norm has no learned",
    )


def test_refusal_of_other_models() -> None:
    class Subclass(VisionTransformer):
        pass

    for model in (nn.Linear(2, 2), Subclass(img_size=32, embed_dim=24, depth=1, num_heads=3)):
        with pytest.raises(TypeError, match=f"wanted a timm .*VisionTransformer .* got .*{type(model).__name__}"):
            open_model(model)
    with pytest.raises(ValueError, match="model: it has no transformer blocks"):
        open_model(small(depth=0))


def test_geometry_reads_the_head_width_from_the_module(make_model: Callable[..., Any]) -> None:
    model = small(qk_norm=True)
    wanted = Geometry.uniform(2, dim=24, num_heads=3, head_dim=8, hidden=96, qk_norm=True)
    assert geometry_of(model) == wanted
    assert geometry_of(gohsp.compress(model, ModelMask.random(model))) == wanted
    narrow = small(depth=1)
    narrow.blocks[0].attn = timm.layers.Attention(24, num_heads=2, attn_head_dim=5, qkv_bias=True)
    assert geometry_of(narrow) == Geometry.uniform(1, dim=24, num_heads=2, head_dim=5, hidden=96)


def test_heads_narrower_than_the_model_are_pruned_exactly(relative_error: Callable[..., float]) -> None:
    torch.manual_seed(0)
    model = small(depth=1).double().eval()
    model.blocks[0].attn = timm.layers.Attention(24, num_heads=4, attn_head_dim=5, qkv_bias=True).double()
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(0))
    compact = gohsp.compress(model, mask)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(compact(x), mask.apply_(model)(x)) < 1e-12


@pytest.fixture
def uneven() -> Any:
    """Blocks of 3 heads of 8 channels and 96 neurons, then of 2 heads of 6 and 48."""
    torch.manual_seed(0)
    model = small()
    model.blocks[1] = small(mlp_ratio=2.0).blocks[0]
    model.blocks[1].attn = timm.layers.Attention(24, num_heads=2, attn_head_dim=6, qkv_bias=True)
    return model.double().eval()


def test_blocks_of_different_sizes_are_pruned_exactly(
    uneven: Any, relative_error: Callable[..., float], tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mask = ModelMask.random(uneven, 0.7, torch.Generator().manual_seed(0))
    assert [size.num_heads for size in mask.geometry.blocks] == [3, 2]
    mask.save(tmp_path / "mask.json")
    assert ModelMask.load(tmp_path / "mask.json") == mask
    compact = gohsp.compress(uneven, mask)
    assert gohsp.count(compact) == gohsp.count(uneven, mask=mask)
    with pytest.raises(ValueError, match=r"geometry\.\w+: wanted blocks that agree on it"):
        gohsp.save(compact, tmp_path / "model")
    with torch.no_grad():
        assert relative_error(gohsp.densify(compact)(x), compact(x)) < 1e-12
        assert relative_error(compact(x), mask.apply_(uneven)(x)) < 1e-12


@pytest.mark.parametrize("groups", [("heads", "hidden"), ("heads", "qk", "v", "attn_out", "mlp_in", "hidden")])
def test_blocks_of_different_sizes_are_chosen_from(uneven: Any, groups: tuple[str, ...]) -> None:
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    result = gohsp.prune(uneven, [x], {"params": 0.8}, groups=groups)
    assert result.report.pruned.params <= 0.8 * result.report.dense.params
    with torch.no_grad():
        torch.testing.assert_close(gohsp.compress(result.model, result.mask)(x), result.model(x))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 2])
def test_a_hybrid_without_a_projection_is_counted_and_saved(channels: int, tmp_path: Path) -> None:
    model = timm.create_model("vit_base_mci_224", img_size=32, depth=1, num_classes=5, in_chans=channels).eval()
    mask = ModelMask.random(model, 0.5, torch.Generator().manual_seed(0))
    small = gohsp.compress(model, mask)
    assert gohsp.count(small) == gohsp.count(model, mask=mask)
    family = family_of(small)
    assert family.image_shape(small) == (channels, 32, 32)
    assert family.stream_shape(small) == (1, 5, 768)
    assert len(family.normalisation(small)[0]) == (3 if channels == 3 else 1)
    gohsp.save(small, tmp_path)
    x = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(gohsp.load(tmp_path)(x), small(x))


def _architecture(model: nn.Module) -> str:
    return family_of(model).architecture(model)


def test_architecture_name() -> None:
    assert _architecture(timm.create_model("vit_tiny_patch16_224", depth=1)) == "vit_tiny_patch16_224"
    assert _architecture(small()) == "VisionTransformer"
    assert _architecture(gohsp.accelerate(small())) == "VisionTransformer"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (GELU(), "gelu"),
        (GELUTanh(), "gelu_tanh"),
        (QuickGELU(), "quick_gelu"),
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (nn.Identity(), "identity"),
    ],
)
def test_activation_names_mean_the_same_in_the_kernels(module: nn.Module, name: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    assert timm_parts.activation_name(module) == name
    assert torch.allclose(gk.ACTIVATIONS[name](x), module(x), rtol=1e-12, atol=1e-14)
    assert torch.allclose(timm_parts.ACTIVATIONS[name]()(x), module(x), rtol=1e-12, atol=1e-14)


def test_every_activation_of_the_kernels_has_a_module() -> None:
    assert set(timm_parts.ACTIVATIONS) == set(gk.ACTIVATIONS)
    assert timm_parts.activation_name(nn.Tanh()) is None


@pytest.fixture
def last_block_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many tokens each chain of sublayers, and each block called by itself, gives."""
    seen: list[int] = []

    def recorded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **named: Any) -> Tensor:
            result = original(*arguments, **named)
            seen.append(result.shape[1])
            return result

        return call

    monkeypatch.setattr(PrunedBlock, "forward", recorded(PrunedBlock.forward))
    monkeypatch.setattr(gk.SublayerChain, "__call__", recorded(gk.SublayerChain.__call__))
    return seen


TOKENS = 10  # 3 x 3 patches and the class token


@pytest.mark.parametrize(
    ("name", "arguments", "given"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}, 1),
        ("vit_tiny_patch16_224", {"fc_norm": True}, 1),
        ("vit_tiny_patch16_224", {"num_classes": 0}, 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, TOKENS),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, TOKENS),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, TOKENS),
        ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0}, TOKENS),
    ],
)
def test_last_block_computes_what_the_head_reads(
    make_model: Callable[..., Any],
    images: Callable[..., Tensor],
    relative_error: Callable[..., float],
    last_block_tokens: list[int],
    name: str,
    arguments: dict[str, Any],
    given: int,
) -> None:
    model, x = make_model(name, **arguments), images()
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(1))
    compact = gohsp.compress(model, mask)
    with torch.no_grad():
        got = compact(x)
        assert relative_error(got, mask.apply_(model)(x)) < 1e-10
    assert last_block_tokens[-1] == given


def test_whoever_reads_all_tokens_gets_all_tokens(
    make_model: Callable[..., Any], images: Callable[..., Tensor], last_block_tokens: list[int]
) -> None:
    model, x = make_model(), images()
    compact = gohsp.compress(model, ModelMask.random(model))

    def tokens(call: Callable[[], Any]) -> int:
        with torch.no_grad():
            call()
        return last_block_tokens[-1]

    assert tokens(lambda: compact(x)) == 1
    assert tokens(lambda: compact.forward_features(x)) == TOKENS
    assert tokens(lambda: compact.forward_intermediates(x)) == TOKENS
    assert tokens(lambda: compact(x, is_causal=True)) == TOKENS
    assert tokens(lambda: compact(x, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool))) == TOKENS
    assert tokens(lambda: compact.train()(x)) == TOKENS
    compact.eval().set_grad_checkpointing(True)
    assert tokens(lambda: compact(x)) == TOKENS
    compact.set_grad_checkpointing(False)
    assert tokens(lambda: compact(x)) == 1


@pytest.mark.parametrize("where", ["blocks", "blocks.1", "norm", "blocks.1.norm2", "blocks.1.mlp"])
def test_hooks_see_all_tokens_and_change_nothing(
    make_model: Callable[..., Any], images: Callable[..., Tensor], where: str
) -> None:
    model, x = make_model(), images()
    compact = gohsp.compress(model, ModelMask.random(model))
    seen: list[torch.Size] = []
    with torch.no_grad():
        plain = compact(x)
        hook = compact.get_submodule(where).register_forward_hook(lambda _m, _i, output: seen.append(output.shape))
        hooked = compact(x)
        hook.remove()
        compact(x)
    assert seen == [torch.Size((2, TOKENS, 192))]
    assert torch.allclose(plain, hooked, rtol=1e-10, atol=1e-12)


def test_changed_pooling_is_noticed(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model, x = make_model(), images()
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(1))
    compact, masked = gohsp.compress(model, mask), mask.apply_(model)
    with torch.no_grad():
        for changed in (compact, masked):
            changed.reset_classifier(0, "avg")
        assert relative_error(compact(x), masked(x)) < 1e-10


def test_truncated_model_still_works(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model, x = make_model(depth=3), images()
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(1))
    compact, masked = gohsp.compress(model, mask), mask.apply_(model)
    with torch.no_grad():
        for changed in (compact, masked):
            changed.prune_intermediate_layers(indices=[0], prune_head=False)
        assert len(compact.blocks) == 1
        assert relative_error(compact(x), masked(x)) < 1e-10


def test_attention_pool_is_timms_own(make_model: Callable[..., Any]) -> None:
    model = make_model(global_pool="map")
    compact = gohsp.compress(model, ModelMask.random(model))
    assert type(compact.attn_pool) is AttentionPoolLatent


def test_what_a_tool_makes_of_the_class_is_of_the_family_still() -> None:
    """As FSDP does, which derives a class of its own from that of the model that it shards."""
    model = small().eval()
    compact: Any = gohsp.compress(model, ModelMask.keep_first(model, heads=2))
    wanted = gohsp.count(compact)
    compact.__class__ = type("Sharded", (type(compact),), {})
    assert gohsp.count(compact) == wanted
    teacher: Any = type("Teacher", (VisionTransformer,), {})(img_size=32, embed_dim=24, depth=2, num_heads=3)
    with watch(teacher) as stream:
        teacher(torch.zeros(1, 3, 32, 32))
    assert len(stream) == 3
    with pytest.raises(TypeError, match=r"not a subclass\), got .*Teacher"):
        gohsp.prune(teacher, [torch.zeros(1, 3, 32, 32)])
