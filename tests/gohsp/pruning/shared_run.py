# SPDX-License-Identifier: Apache-2.0
"""Pruning by processes that share the images. Run as a script it is one of them: ``shared_run.py FOLDER``, under a
launcher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import gohsp

SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
EVERYTHING = ("heads", "hidden", "qk", "v", "attn_in", "attn_out", "mlp_in", "mlp_out")
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": {"groups": EVERYTHING, "similarity": "attention"},
    "given": {"groups": ("heads", "hidden", "qk", "v"), "axes": "given", "similarity": "cosine"},
    "admm": {"optimiser": "admm", "similarity": "explained", "high_is": "auto"},
    "random": {"method": "random"},
    "information": {"method": "information"},
}


def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", **SIZES).double().eval()


def images() -> Tensor:
    return torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def share(process: int) -> list[Tensor]:
    """Return the batches of a process of two, the second of which has few."""
    return [images()[:20], images()[20:37]] if process == 0 else [images()[37:]]


def run(batches: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Prune, and return the weights, the mask and the errors."""
    result = gohsp.prune(model(), batches, {"params": 0.6}, **{"seed": 3, **options})
    found = {f"weights.{name}": value.clone() for name, value in result.model.state_dict().items()}
    for index, block in enumerate(result.mask.blocks):
        found |= {
            f"mask.{index}.{name}": value.clone() for name, value in vars(block).items() if torch.is_tensor(value)
        }
    return found | {"errors": torch.tensor(result.report.errors, dtype=torch.float64)}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for name, options in WAYS.items():
        found = run(share(dist.get_rank()), shared=True, **options)
        save_file(found, folder / f"{name}-{dist.get_rank()}.safetensors")
    try:
        run(share(dist.get_rank()), shared=True, method="random", seed=dist.get_rank())
    except RuntimeError as error:
        print(f"process {dist.get_rank()}: {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
