# SPDX-License-Identifier: Apache-2.0
"""Who counts, writes down or transforms the operations of a model finds PyTorch's own, or is told what to take."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gohsp
import gohsp_kernels as gk
from gohsp.layers import chain


@pytest.fixture
def dense(make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(img_size=32, embed_dim=64, num_heads=4).float()


@pytest.fixture
def compact(dense: nn.Module) -> nn.Module:
    mask = gohsp.ModelMask.random(dense, 0.6, torch.Generator().manual_seed(0))
    for block in mask.blocks:  # a head whose softmax is even takes its mean by no product
        block.qk[:, :4] = block.v[:, :4] = block.heads[:, None]
    return gohsp.compress(dense, mask)


@pytest.fixture
def frozen(compact: nn.Module) -> nn.Module:
    return gohsp.freeze(compact)


def batch(images: Callable[..., Tensor], number: int = 3) -> Tensor:
    return images(number, 32).float()


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("gradients", [True, False])
def test_torchs_counter_counts_what_gohsp_counts(
    dense: nn.Module, compact: nn.Module, images: Callable[..., Tensor], gradients: bool
) -> None:
    macs = 3 * gohsp.count(compact).macs
    with torch.set_grad_enabled(gradients):
        assert counted(dense, batch(images)) == 3 * gohsp.count(dense).macs
        for model in (compact, gohsp.densify(compact), gohsp.freeze(compact), gohsp.freeze(compact, "int8")):
            assert counted(model, batch(images)) == macs


def test_the_counter_sees_exported_models(make_model: Callable[..., Any], images: Callable[..., Tensor]) -> None:
    dense = make_model(img_size=32, embed_dim=64, num_heads=4, global_pool="avg").float()  # which reads all tokens
    compact, x = gohsp.compress(dense, gohsp.ModelMask.random(dense, {"hidden": 0.5, "mlp_in": 0.5})), batch(images)
    with torch.no_grad():
        exported = torch.export.export(compact, (x,)).module()
        assert any("gohsp_kernels" in str(node.target) for node in exported.graph.nodes)
        assert counted(exported, x) == 3 * gohsp.count(compact).macs


def test_the_counter_changes_no_result(
    compact: nn.Module, frozen: nn.Module, images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    x = batch(images)
    with torch.no_grad():
        wanted = frozen(x)
        with FlopCounterMode(display=False):
            assert torch.equal(frozen(x), wanted)
            assert relative_error(compact(x), wanted) < 1e-5


def test_a_traced_model_is_called_again(
    compact: nn.Module, images: Callable[..., Tensor], relative_error: Callable[..., float], tmp_path: Path
) -> None:
    x = batch(images)
    with torch.no_grad():
        traced = torch.jit.trace(compact, x)
        assert "gohsp_kernels::" not in str(traced.inlined_graph)
        traced.save(str(tmp_path / "traced.pt"))
        back = torch.jit.load(str(tmp_path / "traced.pt"))
        for model in (traced, traced, back, back):
            assert relative_error(model(x), compact(x)) < 1e-5


def test_vmap_goes_over_images(
    compact: nn.Module, images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    x = batch(images)
    with torch.no_grad():
        one_by_one = torch.func.vmap(lambda image: compact(image[None])[0])(x)
        assert relative_error(one_by_one, compact(x)) < 1e-5


@pytest.mark.slow
def test_onnx_takes_a_compact_model_as_it_is(
    compact: nn.Module, images: Callable[..., Tensor], relative_error: Callable[..., float], tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = batch(images)
    with torch.no_grad():
        torch.onnx.export(compact, (x,), tmp_path / "model.onnx", verbose=False)
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(found), compact(x)) < 1e-5


REWRITERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": torch.jit.trace,
    "vmap": lambda model, x: torch.func.vmap(lambda image: model(image[None]))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "ONNX": lambda model, x: torch.onnx.export(model, (x,), "model.onnx", verbose=False),
}


PARTS = ("model", "blocks", "blocks.0", "patch_embed", "head")


@pytest.mark.parametrize(
    ("name", "part"), [*((name, part) for name in ("trace", "vmap", "jvp") for part in PARTS), ("ONNX", "model")]
)
def test_a_frozen_model_names_what_to_take_instead(
    frozen: nn.Module, images: Callable[..., Tensor], name: str, part: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = frozen if part == "model" else frozen.get_submodule(part)
    x = batch(images) if part in ("model", "patch_embed") else torch.randn(3, 5, 64)
    with torch.no_grad(), pytest.raises(Exception, match=r"(?s).") as caught:
        REWRITERS[name](model, x)
    error: BaseException | None = caught.value
    while error is not None and "gohsp.densify" not in str(error):
        error = error.__cause__ or error.__context__
    assert error is not None, f"densify is not named: {caught.value}"


def test_hooks_on_frozen_blocks_are_called(frozen: Any, images: Callable[..., Tensor]) -> None:
    x, seen = batch(images), []
    with torch.no_grad():
        wanted = frozen(x)
        handles = [block.register_forward_hook(lambda block, _, y: seen.append((block, y))) for block in frozen.blocks]
        assert torch.equal(frozen(x), wanted)
        assert [block for block, _ in seen] == list(frozen.blocks)
        handles[0].remove()
        handles[1].remove()
        frozen.blocks[1].register_forward_hook(lambda *_: torch.zeros(3, 1, 64))
        assert torch.equal(frozen(x), frozen.forward_head(frozen.norm(torch.zeros(3, 1, 64))))


def test_gradients_in_evaluation_mode_are_told_of_once(
    compact: nn.Module, images: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    x = batch(images)
    chain._tell_of_gradients.cache_clear()
    with caplog.at_level(logging.WARNING, "gohsp"):
        compact.train()(x)
        copy.deepcopy(compact).eval().requires_grad_(False)(x)
        with torch.inference_mode():
            compact.eval()(x)
        assert not caplog.records
        for _ in range(2):
            compact.eval()(x)
    (record,) = caplog.records
    assert "torch.inference_mode() or torch.no_grad()" in record.getMessage()


def test_a_backend_that_no_block_uses_is_told_of(recwarn: pytest.WarningsRecorder) -> None:
    gk.use_backend("reference")
    (warning,) = recwarn
    assert "use_backend('reference') did nothing: it holds in the block of a with statement" in str(warning.message)
    with gk.use_backend("reference"):
        pass

    @gk.use_backend("reference")
    def decorated() -> str:
        return gk.dispatch.selected()

    assert (decorated(), decorated(), gk.dispatch.selected()) == ("reference", "reference", "auto")
    del decorated
    with pytest.raises(ValueError, match="backend: wanted one of"):
        gk.use_backend("gpu")
    assert len(recwarn) == 1
