# SPDX-License-Identifier: Apache-2.0
"""From a model that you trained to a smaller one that runs on the kernels: scikit-learn's digits, on any CPU.

    python examples/digits.py

It needs gohsp, accelerate (for gohsp.train) and scikit-learn (for the digits).
"""

from __future__ import annotations

import tempfile
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits

import gohsp

# 1. Images and labels: a map-style data set of (tensor, class) is all that is asked for.
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8] in -1 .. 1
data = list(zip(pixels, digits.target.tolist(), strict=True))
train, test = data[360:], data[:360]


def top1(model: torch.nn.Module) -> float:
    """Share of the test images that a model knows."""
    images, labels = torch.stack([image for image, _ in test]), torch.tensor([label for _, label in test])
    with torch.inference_mode():
        return (model(images).argmax(dim=1) == labels).double().mean().item()


def told(name: str, model: torch.nn.Module, size: Any) -> None:
    print(f"{name:32} {size.params:7} parameters {size.macs / 1e6:6.2f} MMACs   top-1 {top1(model):.1%}")


# 2. A dense model. Yours is trained already; this one is trained here, in some seconds.
torch.manual_seed(0)
options: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
dense = timm.create_model("vit_tiny_patch16_224", embed_dim=64, depth=3, num_heads=4, **options)
fit = gohsp.Fit(epochs=7, batch_size=48, lr=4e-3, warmup_epochs=1, smoothing=0, mixup=0, cutmix=0)
dense = gohsp.train(dense, train, fit=fit).model
told("dense", dense, gohsp.count(dense))

# 3. Prune it on unlabelled images, to half of its parameters.
images = torch.stack([image for image, _ in train])
result = gohsp.prune(dense, images.split(64), target={"params": 0.5})
small = gohsp.compress(result.model, result.mask)
told("pruned, not trained", small, gohsp.count(small))
print(result.mask.summary(dense))

# 4. Fine-tune what is left; the dense model teaches.
fit = gohsp.Fit(epochs=1, batch_size=48, lr=3e-4, warmup_epochs=0, smoothing=0, mixup=0, cutmix=0)
small = gohsp.train(result, train, fit=fit, distill=gohsp.Distillation(), teacher=dense).model
told("pruned and fine-tuned", small, gohsp.count(small))

# 5. Save it, read it back as another program would, and freeze it for inference.
with tempfile.TemporaryDirectory() as folder:
    gohsp.save(small, folder)
    fast = gohsp.freeze(gohsp.load(folder))
told("loaded and frozen", fast, gohsp.count(small))
