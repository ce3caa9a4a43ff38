# SPDX-License-Identifier: Apache-2.0
"""Video: a dense model on key frames and a pruned one in between, against the dense model alone; a table of results.md.

A stream is a window that drifts over an enlarged image and turns back at its edges. Each model sees each frame once;
what :class:`gohsp.KeyframeModel` would give for every distance of key frames follows from these features, because the
pooled features depend linearly on those that it adds up. Rows that are in the CSV are not computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import gohsp
from bench.harness.results import read_table, write_table
from bench.harness.timing import time_against
from bench.studies.one_shot import IMAGE_SIZE, Lab, Trial
from gohsp.demo.data import Images, load_folder
from gohsp.files import exclusive
from gohsp.runs.classifier import pool, top1

REMOVED = (0.4, 0.6)
SPEEDS = (1.0, 4.0)  # pixels a frame
EVERY = (1, 2, 4, 8, 16)
PICTURE = IMAGE_SIZE * 3 // 2
ROUNDS = 15  # of the timing


@dataclass(frozen=True)
class Row:
    """What a way through the streams gave.

    Attributes:
        removed: Share of the parameters of all blocks that is gone.
        speed: Of the windows, in pixels a frame.
        way: "pruned" is that model alone, "key frames" is :class:`gohsp.KeyframeModel`, and "held" gives the features
            of the last key frame until the next, without a second model.
        every: Frames from one key frame to the next; 0 where there are none.
        macs: Multiply-accumulates of a frame, as a share of the dense model's.
        ms: The same in time: what a frame takes alone, from the times of both models in turns.
        error: Squared error of the features over the variance of the dense ones.
        agreement: Share of the frames for which the linear head answers as it does with the dense features.
        top1: Share for which it answers right.
        streams, frames, seed: How many streams of how many frames, and what drew them and the calibration images.
    """

    removed: float
    speed: float
    way: str
    every: int
    macs: float
    ms: float
    error: float
    agreement: float
    top1: float
    streams: int
    frames: int
    seed: int


COLUMNS = tuple(f.name for f in fields(Row))


def drift(pictures: Tensor, frames: int, speed: float, size: int, seed: int) -> Iterator[Tensor]:
    """Give the frames [B, C, size, size] of windows that drift over pictures [B, C, side, side], one each."""
    generator = torch.Generator().manual_seed(seed)
    room = pictures.shape[-1] - size
    start = room * torch.rand(len(pictures), 2, generator=generator)
    angle = 2 * math.pi * torch.rand(len(pictures), generator=generator)
    step = speed * torch.stack([angle.sin(), angle.cos()], dim=1)
    for t in range(frames):
        folded = (start + t * step) % (2 * room)
        corners = (room - (folded - room).abs()).round().long().tolist()
        yield torch.stack(
            [picture[:, y : y + size, x : x + size] for picture, (y, x) in zip(pictures, corners, strict=True)]
        )


class Recorded(nn.Module):
    """A model that gives features [frames, B, F] again: its input is the number of the frame, once for each stream."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        self.eval()

    def forward(self, frame: Tensor) -> Tensor:
        """Return the features [B, F] of a frame."""
        return self.features[int(frame[0])]


def ways(dense: Tensor, pruned: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Give each way through the streams with its features, from those of both models, [frames, B, F]."""
    yield "pruned", 0, pruned
    for way, between in (("key frames", pruned), ("held", torch.zeros_like(dense))):
        for every in EVERY[way == "held" :]:  # held for one frame is the dense model, as it is with key frames
            model = gohsp.KeyframeModel(Recorded(dense), Recorded(between), every)
            numbers = torch.arange(len(dense))[:, None].expand(-1, dense.shape[1])
            yield way, every, torch.stack([model(frame) for frame in numbers])


def run(data: Path, folder: Path, *, train: int, calibration: int, streams: int, frames: int, seed: int) -> Path:
    """Run what the CSV does not hold yet; returns its path.

    Args:
        data: Folder with train/ and test/, each with one subfolder a class.
        folder: Where the CSV is, or will be.
        train, calibration: Numbers of images for the head and for pruning.
        streams, frames: How many streams, and how many frames each has.
        seed: Draws the streams and the calibration images.
    """
    path, console = folder / "keyframes.csv", Console()
    done = {(float(row["removed"]), int(row["seed"])) for row in read_table(path)}
    missing = [removed for removed in REMOVED if (removed, seed) not in done]
    console.print(f"keyframes: {', '.join(f'{100 * r:.0f} %' for r in missing) or 'nothing'} to come")
    if not missing:
        return path
    lab = Lab(data, train, 10, calibration)
    # The same function as the dense model, on the same kernels as the pruned ones.
    dense = gohsp.freeze(gohsp.compress(lab.model, gohsp.ModelMask.full(lab.model)).eval())
    pictures = load_folder(data / "test", PICTURE, streams, seed)
    exact = {speed: _features(dense, pictures, frames, speed, seed) for speed in SPEEDS}
    for removed in missing:
        result = lab.prune(Trial("keyframes", "gohsp", "ridge", removed, seed=seed))
        pruned = gohsp.freeze(gohsp.compress(result.model, result.mask).eval())
        share = result.report.pruned.macs / result.report.dense.macs
        times = time_against(dense, {"pruned": pruned}, torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), ROUNDS)["pruned"]
        ms, dense_ms = float(times["ms"]), float(times["dense_ms"])
        rows = [
            Row(
                *(removed, speed, way, every, cost(way, every, share), cost(way, every, ms, dense_ms)),
                *_judge(features, exact[speed], lab.head, pictures.labels),
                *(streams, frames, seed),
            )
            for speed in SPEEDS
            for way, every, features in ways(exact[speed], _features(pruned, pictures, frames, speed, seed))
        ]
        _append(path, rows)
        console.print(f"{100 * removed:.0f} %: {len(rows)} rows")
    return path


def cost(way: str, every: int, pruned: float, dense: float = 1.0) -> float:
    """Return what a frame costs where the models cost so much each."""
    if way == "pruned":
        return pruned
    return dense / every + (pruned if way == "key frames" and every > 1 else 0.0)


def _features(model: nn.Module, pictures: Images, frames: int, speed: float, seed: int) -> Tensor:
    """Return the pooled features [frames, B, F] of the streams."""
    windows = drift(pictures.pixels, frames, speed, IMAGE_SIZE, seed)
    with torch.inference_mode():
        parts = [Images(pixels, pictures.labels, pictures.classes).batches(32) for pixels in windows]
        return torch.stack([torch.cat([pool(model(batch)) for batch in part]) for part in parts])


def _judge(features: Tensor, exact: Tensor, head: nn.Module, labels: Tensor) -> tuple[float, float, float]:
    spread = (exact - exact.mean(dim=(0, 1))).square().sum()
    answers, wanted = head(features), head(exact).argmax(dim=-1)
    right = top1(answers.flatten(0, 1), labels.expand(len(exact), -1).flatten())
    agreement = (answers.argmax(dim=-1) == wanted).double().mean()
    return float((features - exact).square().sum() / spread), float(agreement), right


def _append(path: Path, rows: list[Row]) -> None:
    written = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(row).items()}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent):
        write_table(path, COLUMNS, [*read_table(path), *written])
