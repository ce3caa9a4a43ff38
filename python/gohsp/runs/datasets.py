# SPDX-License-Identifier: Apache-2.0
"""Images by name: a folder, a torchvision data set, whatever timm's create_dataset knows, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn

from gohsp.models.registry import family_of
from gohsp.recipe import Augmentation, DataSource

TEST_FOLDERS = ("val", "validation", "test")
SIZED = 1024  # images whose files' sizes tell them apart as well: asking for all of a large set takes minutes
TEST_SHARE = 0.2  # of a source that has no test set of its own


@dataclass(frozen=True)
class View:
    """Some samples of a data set, each image transformed: a map-style data set itself.

    Attributes:
        data: Map-style data set of (PIL image, class).
        indices: Which samples, in which order.
        transform: From a PIL image to a tensor [C, height, width].
        mode: PIL's name of the colours that the transform is made for.
    """

    data: Any
    indices: list[int]
    transform: Callable[[Any], Tensor]
    mode: str

    def __len__(self) -> int:
        return len(self.indices)

    def digest(self) -> str:
        """Return what tells these images from others: SHA-256 of their order and, in a folder, names and classes."""
        samples = getattr(self.data, "samples", None)
        if samples is None:
            listed: list[Any] = [len(self.data), *self.indices]
        else:
            root = self.data.root
            listed = [(os.path.relpath(samples[index][0], root), samples[index][1]) for index in self.indices]
            listed += [os.stat(samples[index][0]).st_size for index in self.indices[:SIZED]]
        return hashlib.sha256(json.dumps(listed).encode("utf-8", "surrogateescape")).hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[self.indices[index]]
        return self.transform(image.convert(self.mode)), int(label)


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
        train: Augmented, for training.
        plain: The same images without augmentation, for ranking and pruning.
        test: What is measured on.
        classes: Number of classes; None where the source does not tell.
        labelled: Whether there are classes; the images of a flat folder have none.
        source: Name of what they were opened from; the whole path of a folder.
    """

    train: View
    plain: View
    test: View
    classes: int | None
    source: str = ""
    labelled: bool = True

    def calibration(self, count: int, batch_size: int = 32) -> Iterator[Tensor]:
        """Batches of some training images, [<= batch_size, C, height, width], without augmentation."""
        for start in range(0, min(count, len(self.plain)), batch_size):
            stop = min(start + batch_size, count, len(self.plain))
            yield torch.stack([self.plain[index][0] for index in range(start, stop)])


def open_images(source: DataSource, model: Any, augment: Augmentation | None = None, seed: int = 0) -> Images:
    """Open the images of a run.

    Args:
        source: Names them. A folder holds ``train`` and ``val``, ``validation`` or ``test``, each with one subfolder a
            class, or is itself such a folder, of which every fifth image then is for testing. Where no subfolder holds
            images, those in the folder itself are taken, without classes.
        model: timm vision transformer: its size of images, and the normalisation that timm recorded for it.
        augment: For training; None trains on images as they are.
        seed: Which images are taken where not all are wanted.

    Raises:
        ValueError: The source is not there, is not known, or has no random access (a run that goes on needs it).
        ImportError: A package that reads this source is not installed.
    """
    train, test, classes = _open(source)
    first, second = _indices(train, test, source, seed)
    plain, training = _transforms(model, augment)
    held_out = train if test is None else test
    mode = "L" if image_shape(model)[0] == 1 else "RGB"
    return Images(
        train=View(train, first, training, mode),
        plain=View(train, first, plain, mode),
        test=View(held_out, second, plain, mode),
        classes=classes,
        labelled=not isinstance(train, FlatFolder),
        source=_full_name(source.source),
    )


def _full_name(source: str) -> str:
    """Return the name of a source that does not depend on where a command was started."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model is made for.

    Raises:
        TypeError: The model is of no family that gohsp knows.
        ValueError: It takes images of any size.
    """
    shape = family_of(model).image_shape(model)
    if shape is None:
        raise ValueError("model: wanted one that is made for images of one size; got one that takes any")
    return shape


def _transforms(model: Any, augment: Augmentation | None) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Return the transforms for measuring and for training."""
    config = resolve_model_data_config(model)
    size = image_shape(model)
    common = {"input_size": size, "interpolation": config["interpolation"]}
    # Models of one channel have no normalisation on record: half and half brings pixels to [-1, 1].
    grey = size[0] == 1
    common |= {"mean": (0.5,) if grey else config["mean"], "std": (0.5,) if grey else config["std"]}
    plain = create_transform(**common, crop_pct=config["crop_pct"])
    if augment is None:
        return plain, plain
    training = create_transform(
        **common,
        is_training=True,
        scale=augment.scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        re_prob=augment.erase,
        re_mode="pixel",
    )
    return plain, training


def _indices(train: Any, test: Any | None, source: DataSource, seed: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(train), generator=generator, device="cpu").tolist()
    if test is None:
        cut = round(TEST_SHARE * len(first))
        first, second = first[cut:], first[:cut]
    else:
        second = torch.randperm(len(test), generator=generator, device="cpu").tolist()
    first, second = first[: source.train_images], second[: source.test_images]
    if not first or not second:
        raise ValueError(
            f"data: {source.source} has too few images: {len(first)} to train and {len(second)} to test on"
        )
    return first, second


def _open(source: DataSource) -> tuple[Any, Any | None, int | None]:
    """Return data sets of (PIL image, class) for training and testing, the second None if there is one only."""
    name, root = source.source, source.root.expanduser()
    if name == "digits":
        return Digits(), None, 10
    if name.startswith("torchvision:"):
        return _torchvision(name.partition(":")[2], root)
    if Path(name).expanduser().is_dir():
        return _folder(Path(name).expanduser())
    if "/" in name and name.split("/")[0] in ("hfds", "torch"):
        return _timm(name, root)
    raise ValueError(
        "data: wanted a folder of images, torchvision:NAME (such as torchvision:CIFAR10), hfds/NAME or torch/NAME as "
        f"timm has them, or digits; got {name!r}, which is no folder here"
    )


def image_folder(root: Path) -> Any:
    """Return the data set of (PIL image, class) of a folder with one subfolder of images a class.

    Images are read by :func:`read_image`.

    Raises:
        ValueError: There is no such folder, it holds no images, or links lead to some of its images twice.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(root), loader=read_image)
        _refuse_links_back({os.path.dirname(path) for path, _ in found.samples})
        return found
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"data: wanted a folder with one subfolder of images a class; got {root}: {error}") from error


class FlatFolder:
    """The images in a folder, by name and without classes: a map-style data set of (PIL image, -1)."""

    def __init__(self, root: Path) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.root = str(root)
        found = (path for path in root.iterdir() if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
        self.samples = [(str(path), -1) for path in sorted(found)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def _refuse_links_back(folders: set[str]) -> None:
    """A link to a folder above would give all of its images another class as well."""
    met: dict[str, str] = {}
    for folder in sorted(folders):
        first = met.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise ValueError(f"data: wanted each folder of images once; {first} and {folder} are one, by a link")


def read_image(path: str | Path) -> Image.Image:
    """Return the image of a file as RGB, 8 bits a channel, upright.

    The orientation that a camera noted is applied. What is transparent is laid on white. Grey images of 16 bits are
    scaled to 8. Of several frames it is the first.

    Raises:
        ValueError: The file is no image that Pillow reads, is damaged, too large or not readable, or its pixels have no
            range that is known (floating point, integers of 32 bits).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")  # opening a pipe would wait for somebody to write into it
        with open(path, "rb") as file, Image.open(file) as image:
            return _to_rgb(ImageOps.exif_transpose(image), image.format)
    except UnidentifiedImageError as error:
        raise ValueError(f"data: {path}: wanted an image, got something that Pillow does not know") from error
    except Exception as error:  # decoders raise whatever they meet in a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"data: {path}: wanted an image that can be read, but {reason}") from error


def _to_rgb(image: Image.Image, written: str | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and written in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise ValueError(f"its pixels (mode {image.mode}) have no range that is known")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _folder(root: Path) -> tuple[Any, Any | None, int | None]:
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        try:
            images = image_folder(root)
        except ValueError:
            if not (flat := FlatFolder(root)).samples:
                raise
            return flat, None, None
        return images, None, len(images.classes)
    train, held_out = image_folder(root / "train"), image_folder(test)
    if train.classes != held_out.classes:
        raise ValueError(f"data: the classes in {root / 'train'} and {test} differ")
    return train, held_out, len(train.classes)


def _torchvision(name: str, root: Path) -> tuple[Any, Any, int | None]:
    from torchvision import datasets

    maker = getattr(datasets, name, None)
    parameters = inspect.signature(maker).parameters if inspect.isclass(maker) else {}
    if "train" in parameters:
        choices: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    elif "split" in parameters:
        choices = [{"split": "train"}, {"split": "val" if name == "ImageNet" else "test"}]
    else:
        raise ValueError(f"data: torchvision {name!r} is no data set with a training and a test part")
    download = {"download": True} if "download" in parameters else {}
    root.mkdir(parents=True, exist_ok=True)
    try:
        train, test = (maker(str(root), **choice, **download) for choice in choices)  # type: ignore[misc]
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"data: torchvision could not open {name} in {root}: {error}") from error
    classes = getattr(train, "classes", None)
    return train, test, None if classes is None else len(classes)


def _timm(name: str, root: Path) -> tuple[Any, Any, int | None]:
    train, test = (_timm_part(name, root, splits) for splits in (("train",), ("validation", "test")))
    for part in (train, test):
        if not hasattr(part, "__getitem__"):
            raise ValueError(f"data: wanted a data set with random access, which {name} has not")
    names = getattr(getattr(train, "reader", None), "class_to_idx", None)
    return train, test, len(names) if names else None


def _timm_part(name: str, root: Path, splits: tuple[str, ...]) -> Any:
    """Return the first of some splits that there is."""
    for split in splits:
        try:
            return create_dataset(name, root=str(root), split=split, is_training=split == "train", download=True)
        except ImportError as error:
            raise ImportError(f"data: {name} needs a package that is not installed: {error}") from error
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            reason = error
    raise ValueError(f"data: timm could not open the split {' or '.join(splits)} of {name}: {reason}") from reason


class Digits:
    """The 1797 handwritten digits that come with scikit-learn, 8 x 8 pixels, grey: small enough for tests."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("data: digits needs scikit-learn; install it: pip install scikit-learn") from error
        found = load_digits()
        self.pixels, self.labels = (found.images / 16 * 255).round().astype("uint8"), found.target

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])
