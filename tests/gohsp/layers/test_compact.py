# SPDX-License-Identifier: Apache-2.0
"""Compact modules one by one: against the masked dense modules, in inference and in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.layers import PrunedAttention, PrunedBlock, PrunedMlp
from gohsp.masks.mask import BlockMask, ModelMask

TOKENS = 7


@pytest.fixture
def pair(make_model: Callable[..., Any]) -> Callable[..., tuple[Any, Any, BlockMask]]:
    """Return a maker of (compact block, masked dense block, mask) in float64."""

    def make(edit: Callable[[BlockMask], None] | None = None, **arguments: Any) -> tuple[Any, Any, BlockMask]:
        model = make_model(depth=1, **arguments)
        mask = ModelMask.random(model, 0.6, torch.Generator().manual_seed(7))
        mask.blocks[0].heads = torch.tensor([True, False, True])
        if edit is not None:
            edit(mask.blocks[0])
        compact = gohsp.compress(model, mask)
        return compact.blocks[0], mask.apply_(model).blocks[0], mask.blocks[0]  # type: ignore[index]

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, TOKENS, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def clear(*names: str) -> Callable[[BlockMask], None]:
    def edit(mask: BlockMask) -> None:
        for name in names:
            getattr(mask, name)[:] = False

    return edit


def keep_all(mask: BlockMask) -> None:
    for name in vars(mask):
        getattr(mask, name)[:] = True


def one_head_without_qk(mask: BlockMask) -> None:
    mask.qk[0] = False


def one_head_without_v(mask: BlockMask) -> None:
    mask.v[2] = False


EDGES = {
    "ragged": None,
    "all kept": keep_all,
    "a head without QK channels": one_head_without_qk,
    "no QK channel at all": clear("qk"),
    "a head without V channels": one_head_without_v,
    "no head": clear("heads"),
    "no neuron": clear("hidden"),
    "no input columns": clear("attn_in", "mlp_in"),
    "no output columns": clear("attn_out", "mlp_out"),
    "nothing": clear("heads", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out"),
}
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 1.0},
    "no qkv bias": {"qkv_bias": False},
    "no bias, layer scale": {"qkv_bias": False, "proj_bias": False, "init_values": 1.0},
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("edge", EDGES)
def test_block_agrees_with_the_masked_dense_block(
    pair: Callable[..., Any], tokens: Tensor, relative_error: Callable[..., float], edge: str, parts: str
) -> None:
    compact, masked, _ = pair(EDGES[edge], **PARTS[parts])
    with torch.no_grad():
        wanted = masked(tokens)
        assert relative_error(compact(tokens), wanted) < 1e-12
        assert relative_error(compact(tokens, num_queries=2), wanted[:, :2]) < 1e-12
        assert relative_error(compact.attn(tokens) + 1, masked.attn(tokens) + 1) < 1e-12
        assert relative_error(compact.mlp(tokens) + 1, masked.mlp(tokens) + 1) < 1e-12


def test_eps_of_each_norm_is_its_own(
    pair: Callable[..., Any], tokens: Tensor, relative_error: Callable[..., float]
) -> None:
    compact, masked, _ = pair(keep_all, qk_norm=True)
    for block in (compact, masked):
        block.norm1.eps, block.norm2.eps = 0.1, 0.3
        block.attn.q_norm.eps = block.attn.k_norm.eps = 0.2
    with torch.no_grad():
        assert relative_error(compact(tokens), masked(tokens)) < 1e-12


@pytest.mark.parametrize("edge", EDGES)
def test_block_in_float32_on_each_backend(
    pair: Callable[..., Any], tokens: Tensor, relative_error: Callable[..., float], backend: str, edge: str
) -> None:
    compact, masked, _ = pair(EDGES[edge], init_values=1.0)
    with torch.no_grad():
        wanted = masked(tokens)
        assert relative_error(compact.float()(tokens.float()), wanted) < 1e-5
        assert relative_error(compact(tokens.float(), num_queries=1), wanted[:, :1]) < 1e-5


def test_no_output_columns_is_the_identity(pair: Callable[..., Any], tokens: Tensor) -> None:
    compact, _, _ = pair(clear("attn_out", "mlp_out"))
    assert torch.equal(compact(tokens), tokens)


def test_dead_head_leaves_no_parameters(pair: Callable[..., Any]) -> None:
    compact, _, mask = pair(one_head_without_v)
    assert compact.attn.heads == (0,)
    rows = 2 * int(mask.qk[0].sum()) + int(mask.v[0].sum())
    assert compact.attn.qkv.weight.shape == (rows, int(mask.attn_in.sum()))


def test_signatures_are_timms() -> None:
    def names(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(PrunedAttention.forward) == names(Attention.forward)
    assert names(PrunedMlp.forward) == names(Mlp.forward)
    block = names(PrunedBlock.forward)
    assert block[: len(names(Block.forward))] == names(Block.forward)
    defaults = inspect.signature(PrunedBlock.forward).parameters
    assert all(defaults[name].default in (None, False) for name in block[2:])


def test_unknown_arguments_are_refused(pair: Callable[..., Any], tokens: Tensor) -> None:
    compact, _, _ = pair()
    for module in (compact, compact.attn):
        with pytest.raises(TypeError, match="rope"):
            module(tokens, rope=None)
    with pytest.raises(ValueError, match="num_queries"):
        compact(tokens, num_queries=TOKENS + 1)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "shape", [(TOKENS, TOKENS), (1, TOKENS, TOKENS), (3, 1, TOKENS), (2, 1, TOKENS, TOKENS), (2, 3, TOKENS, TOKENS)]
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_masks(
    pair: Callable[..., Any],
    tokens: Tensor,
    relative_error: Callable[..., float],
    shape: tuple[int, ...],
    kind: str,
    qk_norm: bool,
) -> None:
    compact, masked, _ = pair(None if qk_norm else one_head_without_qk, qk_norm=qk_norm)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attn_mask = noise > -0.5 if kind == "bool" else noise
    if kind == "bool":
        attn_mask[..., 0] = True  # a row that may attend to nothing has no softmax
    with torch.no_grad():
        wanted = masked(tokens, attn_mask=attn_mask)
        assert relative_error(compact(tokens, attn_mask=attn_mask), wanted) < 1e-12
        assert relative_error(compact(tokens, attn_mask=attn_mask, num_queries=3), wanted[:, :3]) < 1e-12
        unmasked = masked(tokens)
    assert relative_error(wanted, unmasked) > 1e-3, "the mask must matter in this test"


@pytest.mark.parametrize("edit", [None, clear("heads")])
def test_causal_attention(
    pair: Callable[..., Any], tokens: Tensor, relative_error: Callable[..., float], edit: Any
) -> None:
    compact, masked, _ = pair(edit)
    with torch.no_grad():
        assert relative_error(compact(tokens, is_causal=True), masked(tokens, is_causal=True)) < 1e-12


@pytest.mark.parametrize(
    ("attn_mask", "is_causal", "message"),
    [
        (torch.ones(TOKENS, TOKENS, dtype=torch.int64), False, "attn_mask: wanted dtype torch.bool or torch.float64"),
        (torch.ones(TOKENS, TOKENS + 1, dtype=torch.bool), False, r"broadcasts to \(2, 3, 7, 7\), got \(7, 8\)"),
        (torch.ones(2, 2, TOKENS, TOKENS, dtype=torch.bool), False, r"broadcasts to \(2, 3, 7, 7\), got \(2, 2, 7, 7"),
        (torch.ones(1, 2, 3, TOKENS, TOKENS, dtype=torch.bool), False, r"broadcasts to \(2, 3, 7, 7\)"),
        (torch.ones(TOKENS, TOKENS, dtype=torch.bool), True, "attn_mask: wanted None together with is_causal"),
    ],
)
def test_wrong_attention_masks(
    pair: Callable[..., Any], tokens: Tensor, attn_mask: Tensor, is_causal: bool, message: str
) -> None:
    compact, _, _ = pair()
    with pytest.raises(ValueError, match=message):
        compact(tokens, attn_mask=attn_mask, is_causal=is_causal)


def test_state_dict_has_timms_names_and_compact_shapes(pair: Callable[..., Any]) -> None:
    compact, masked, mask = pair(init_values=1.0)
    state, dense = compact.state_dict(), masked.state_dict()
    assert list(state) == list(dense)
    layout = mask.layout()
    inputs, outputs = int(mask.attn_in.sum()), int(mask.attn_out.sum())
    assert state["attn.qkv.weight"].shape == (layout.qkv_rows.numel(), inputs)
    assert state["attn.proj.weight"].shape == (outputs, layout.proj_cols.numel())
    assert state["ls1.gamma"].shape == (outputs,)
    assert state["mlp.fc1.weight"].shape == (int(mask.hidden.sum()), int(mask.mlp_in.sum()))
    assert state["mlp.fc2.bias"].shape == (int(mask.mlp_out.sum()),)
    assert state["norm1.weight"].shape == (192,)


@pytest.mark.parametrize("parts", [*PARTS, "qk-norm"])
def test_gradients_are_those_of_the_masked_dense_block(
    pair: Callable[..., Any], tokens: Tensor, relative_error: Callable[..., float], parts: str
) -> None:
    compact, masked, mask = pair(None, **(PARTS | {"qk-norm": {"qk_norm": True}})[parts])
    inputs = [tokens.clone().requires_grad_() for _ in range(2)]
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for block, x in zip((compact, masked), inputs, strict=True):
        (block(x) * weights).sum().backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-10  # type: ignore[arg-type]
    layout = mask.layout()
    every = torch.arange(192)
    rows = {
        "attn.qkv": (layout.qkv_rows, layout.attn_in),
        "attn.proj": (layout.attn_out, layout.proj_cols),
        "mlp.fc1": (layout.hidden, layout.mlp_in),
        "mlp.fc2": (layout.mlp_out, layout.hidden),
        "ls1": (layout.attn_out, None),
        "ls2": (layout.mlp_out, None),
    }
    dense = dict(masked.named_parameters())
    for name, parameter in compact.named_parameters():
        kept_rows, kept_cols = rows.get(name.rpartition(".")[0], (every, None))
        wanted = dense[name].grad
        if name in ("attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight", "attn.k_norm.bias"):
            kept_rows = torch.arange(64)
        wanted = wanted[kept_rows]  # type: ignore[index]
        if wanted.dim() == 2:
            wanted = wanted[:, kept_cols]
        if name == "attn.qkv.bias" or name == "attn.k_norm.bias":
            # The softmax takes the k bias away, so its gradient is rounding noise.
            assert (parameter.grad - wanted).abs().max() < 1e-10 * dense["attn.qkv.weight"].grad.abs().max()
        else:
            assert relative_error(parameter.grad, wanted) < 1e-10, name


DROPS: dict[str, dict[str, float]] = {
    "attention dropout": {"attn_drop_rate": 1.0},
    "projection dropout": {"proj_drop_rate": 1.0},
    "drop path": {"drop_path_rate": 1.0},
}


@pytest.mark.parametrize("drop", DROPS)
def test_dropout_is_honoured_in_training_only(
    pair: Callable[..., Any], make_model: Callable[..., Any], tokens: Tensor, drop: str
) -> None:
    model = make_model(depth=2, init_values=1.0, **DROPS[drop])
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(0))
    compact, masked = gohsp.compress(model, mask).blocks[1], mask.apply_(model).blocks[1]  # type: ignore[index]
    with torch.no_grad():
        # All is dropped, so chance plays no part and the two blocks must still agree.
        assert torch.allclose(compact.train()(tokens), masked.train()(tokens), rtol=1e-12, atol=1e-12)
        whole = compact.eval()(tokens)
        assert torch.allclose(whole, masked.eval()(tokens), rtol=1e-12, atol=1e-12)
        dropped = compact.train()(tokens)
    assert not torch.allclose(dropped, whole, rtol=1e-3)


def test_dropout_draws_anew_on_each_call(pair: Callable[..., Any], tokens: Tensor) -> None:
    compact, _, _ = pair(attn_drop_rate=0.3)
    compact.train()
    assert not torch.equal(compact(tokens), compact(tokens))
    compact.attn.attn_drop.p = 0.0
    assert torch.equal(compact(tokens), compact(tokens))


def test_modules_are_called_when_they_are_hooked(pair: Callable[..., Any], tokens: Tensor) -> None:
    compact, masked, _ = pair()
    names = ("norm1", "attn", "norm2", "mlp")
    calls: list[str] = []
    with torch.no_grad():
        fused = compact(tokens)
        for name in names:
            before = len(calls)
            module = getattr(compact, name)
            hook = module.register_forward_hook(lambda *_, name=name: calls.append(name))
            assert torch.allclose(compact(tokens), fused, rtol=1e-12, atol=1e-12)
            hook.remove()
            assert calls[before:] == [name]
        pre = compact.attn.register_forward_pre_hook(lambda _m, inputs: (torch.zeros_like(inputs[0]),))
        changed = compact(tokens)
        pre.remove()
        same = masked.attn.register_forward_pre_hook(lambda _m, inputs: (torch.zeros_like(inputs[0]),))
        assert torch.allclose(changed, masked(tokens), rtol=1e-12, atol=1e-12)
        same.remove()


def optimiser_step(block: nn.Module) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.25)


def load_other_weights(block: nn.Module) -> None:
    block.load_state_dict({name: 0.75 * value for name, value in block.state_dict().items()})


def there_and_back(block: nn.Module) -> None:
    optimiser_step(block.to(torch.float64))
    block.to(torch.float32)


def new_parameters(block: Any) -> None:
    block.attn.proj.weight = nn.Parameter(0.5 * block.attn.proj.weight.detach())
    block.mlp.fc1.bias = nn.Parameter(0.5 * block.mlp.fc1.bias.detach())


@pytest.mark.parametrize("change", [optimiser_step, load_other_weights, there_and_back, new_parameters])
def test_changed_parameters_are_noticed(
    pair: Callable[..., Any],
    tokens: Tensor,
    relative_error: Callable[..., float],
    backend: str,
    change: Callable[[Any], None],
) -> None:
    compact, _, _ = pair(init_values=1.0)
    compact, x = compact.float(), tokens.float()
    with torch.no_grad():
        before = compact(x)
        change(compact)
        after = compact(x)
        with gk.use_backend("reference"):
            wanted = compact.double()(tokens)
    assert relative_error(after, wanted) < 1e-5
    assert relative_error(before, wanted) > 1e-3


def test_training_step_lowers_the_loss_and_inference_follows(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model = make_model(init_values=1.0).float()
    compact = gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(0)))
    x, labels = images(batch=4).float(), torch.tensor([0, 1, 2, 3])
    optimiser = torch.optim.AdamW(compact.parameters(), lr=1e-3)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(compact(x), labels)

    with torch.no_grad():
        first = loss()
    for _ in range(3):
        compact.train()
        optimiser.zero_grad()
        loss().backward()
        assert all(parameter.grad is not None for parameter in compact.parameters())
        optimiser.step()
        compact.eval()
    with torch.no_grad():
        assert loss() < 0.8 * first
        fast = compact(x)
        with gk.use_backend("reference"):
            assert relative_error(fast, compact(x)) < 1e-5


def test_gradient_checkpointing_changes_nothing(make_model: Callable[..., Any], images: Callable[..., Tensor]) -> None:
    model = make_model(init_values=1.0)
    compact = gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(0))).train()
    gradients = []
    for enable in (False, True):
        compact.set_grad_checkpointing(enable)  # type: ignore[operator]
        compact.zero_grad()
        compact(images()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in compact.parameters()])  # type: ignore[union-attr]
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-10, atol=1e-12)


def test_empty_batch(pair: Callable[..., Any], backend: str) -> None:
    compact, _, _ = pair()
    with torch.no_grad():
        assert compact.float()(torch.empty(0, TOKENS, 192)).shape == (0, TOKENS, 192)
        assert compact(torch.empty(0, TOKENS, 192), num_queries=1).shape == (0, 1, 192)


def test_flags_of_the_dense_block_are_kept(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    model.blocks[1].train()
    compact = gohsp.compress(model, ModelMask.random(model))
    assert not compact.blocks[0].attn.qkv.weight.requires_grad
    assert compact.blocks[1].attn.qkv.weight.requires_grad
    assert not compact.blocks[0].mlp.training and compact.blocks[1].mlp.drop1.training


def test_index_lists_move_but_are_not_saved(pair: Callable[..., Any]) -> None:
    compact, _, _ = pair(init_values=1.0)
    names = {name for name, _ in compact.named_buffers(remove_duplicate=False)}
    assert names == {"attn.in_cols", "attn.out_cols", "ls1.out_cols", "mlp.in_cols", "mlp.out_cols", "ls2.out_cols"}
    assert not names & set(compact.state_dict())
    compact.half()
    assert all(buffer.dtype == torch.int64 for buffer in compact.buffers())


def test_repr_tells_the_layout(pair: Callable[..., Any]) -> None:
    compact, _, mask = pair(init_values=1.0)
    layout = mask.layout()
    text = repr(compact)
    assert f"heads=(0, 2), qk={layout.qk_widths}, v={layout.v_widths}, scale=0.125" in text
    assert f"(fc1): CompactLinear({int(mask.mlp_in.sum())}, {int(mask.hidden.sum())}, bias=True)" in text
    assert f"CompactLayerScale({int(mask.attn_out.sum())} of 192)" in text
    assert "activation=gelu" in text


def test_compact_parts_compute_what_their_names_say(pair: Callable[..., Any], tokens: Tensor) -> None:
    compact, masked, mask = pair(init_values=1.0)
    columns = tokens[..., mask.mlp_in]
    assert torch.allclose(compact.mlp.fc1(columns), masked.mlp.fc1(tokens)[..., mask.hidden], rtol=1e-10, atol=1e-12)
    written = tokens * mask.attn_out
    assert torch.allclose(compact.ls1(written), masked.ls1(written), rtol=1e-12)
