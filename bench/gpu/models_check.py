# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check``: the checks of :mod:`gohsp_kernels.gpu_check`, and whole models against what else runs them.

Per model, mask and batch: the dense model in plain eager attention, with PyTorch's scaled_dot_product_attention, and
that compiled with max-autotune; the sliced model (the pruned one as plain PyTorch) in the same three forms; and the
compressed model on each GPU backend, kernel by kernel and replayed from a CUDA graph. All in float16. Each result is
compared with the masked dense model in float64 (the dense ones: with the dense model); ours is judged by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from bench.gpu import paper_model
from bench.harness import cases
from gohsp_kernels import gpu_check, graphed
from gohsp_kernels.gpu_check import BATCHES, Case, Part, Row, Scope, error_of, first_line, gpu_backends, milliseconds

Forward = Callable[[Tensor], Tensor]

DTYPE = torch.float16
LIMIT = 2e-2
"""Largest error of logits: twelve blocks of float16 roundings."""
COMPARED = 8  # images that go through the model in float64
CASES = [
    cases.Case(model, preset)
    for model, (heads, neurons) in paper_model.PRESETS.items()
    for preset in (f"{heads}x{neurons}", "ragged")
]

REHEARSED = [cases.Case("deit_tiny_patch16_224", "2x96", image_size=32)]


def with_attention(model: nn.Module, fused: bool) -> nn.Module:
    """A copy of a timm model whose attention calls scaled_dot_product_attention, or multiplies matrices itself."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]
    return result


def compiled(model: nn.Module) -> Forward:
    """As fast as PyTorch makes it: kernels chosen by measuring, launched from CUDA graphs."""
    torch.compiler.reset()
    result: Forward = torch.compile(model, fullgraph=True, dynamic=False, mode="max-autotune")
    return result


def contenders(
    work: cases.Workload, device: torch.device, dense: bool
) -> Iterator[tuple[str, str, Callable[[], Forward]]]:
    """Name, backend ("" where it is not ours) and how to make it; with ``dense`` the unpruned model too."""

    def plain(model: nn.Module) -> nn.Module:
        return model.to(device, DTYPE)

    for name in ("dense", "sliced") if dense else ("sliced",):
        yield f"{name} eager", "", lambda n=name: plain(with_attention(getattr(work, n), False))
        yield f"{name} sdpa", "", lambda n=name: plain(with_attention(getattr(work, n), True))
        yield f"{name} compile", "", lambda n=name: compiled(plain(with_attention(getattr(work, n), True)))
    for backend, support in gpu_backends(device, DTYPE):
        if support:
            yield f"gohsp {backend}", backend, lambda: plain(copy.deepcopy(work.compressed))
            if device.type == graphed.CAPTURABLE:
                yield (
                    f"gohsp {backend} graph",
                    backend,
                    lambda: gohsp.GraphedModel(plain(copy.deepcopy(work.compressed))),
                )


@torch.no_grad()
def measured(make: Callable[[], Forward], backend: str, images: Tensor, truth: Tensor, device: torch.device) -> Row:
    """Time and error of one contender, or why there is none."""
    try:
        with gk.use_backend(backend or "auto"):
            forward = make()
            error = error_of(forward(images)[: len(truth)], truth)
            ms = milliseconds(lambda: forward(images), device, rounds=30)
    except Exception as error:
        return {"ok": False if backend else None, "reason": first_line(error)}
    ok = error <= LIMIT if backend else None
    return {"ms": ms, "images/s": len(images) / ms * 1e3, "error": error, "ok": ok}


def workload(case: cases.Case, device: torch.device, images: int) -> tuple[cases.Workload, Tensor, dict[str, Tensor]]:
    """What runs, on which images, and the logits of the dense and the masked model in float64."""
    work = cases.load(case)
    x = work.images(images).to(device, DTYPE)
    truths: dict[str, Tensor] = {}
    with torch.no_grad():
        for kind, model in (("dense", copy.deepcopy(work.dense).double()), ("masked", work.masked_in_double())):
            truths[kind] = model.to(device)(x[:COMPARED].double())
    return work, x, truths


def models(scope: Scope, todo: Sequence[cases.Case] = tuple(CASES), batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """A case for each model, mask, batch and contender."""

    def run(row: Row, make: Callable[[], Forward], backend: str, images: Tensor, truth: Tensor) -> Row:
        return {**row, **measured(make, backend, images, truth, scope.device)}

    for case in todo:
        work, images, truths = workload(case, scope.device, max(batches))
        for batch in batches:
            for name, backend, make in contenders(work, scope.device, dense=case.preset != "ragged"):
                truth = truths["dense" if name.startswith("dense") else "masked"][:batch]
                row: Row = {"model": case.model, "mask": case.preset, "batch": batch, "contender": name}
                text = f"{case.model} {case.preset}, batch {batch}, {name}"
                yield text, partial(run, row, make, backend, images[:batch], truth)


PARTS = {
    **gpu_check.PARTS,
    "models": Part(
        models, 25, backends=("",), precisions=gpu_check.HALF, together=False, module="bench.gpu_check", seconds=300
    ),
}


def main() -> int:
    """The command line of ``python -m bench.gpu_check``; the exit code."""
    return gpu_check.main(parts=PARTS)
