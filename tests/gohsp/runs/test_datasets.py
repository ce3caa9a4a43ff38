# SPDX-License-Identifier: Apache-2.0
"""Images by name: folders, torchvision, timm, digits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision import datasets

from gohsp.demo.data import load_folder
from gohsp.recipe import Augmentation, DataSource
from gohsp.runs.datasets import open_images, read_image
from gohsp.training.seeds import seeded


@pytest.fixture
def model() -> Any:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=2)


def write_folder(root: Path, count: int = 5, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((20, 24, 3), 100 * number + index, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def open_(source: str | Path, model: Any, augment: Augmentation | None = None, **options: Any) -> Any:
    return open_images(DataSource(source=str(source), **options), model, augment)


def test_a_folder_of_classes_gives_a_fifth_for_testing(tmp_path: Path, model: Any) -> None:
    images = open_(write_folder(tmp_path), model)
    assert (len(images.train), len(images.test), images.classes) == (8, 2, 2)
    assert not set(images.train.indices) & set(images.test.indices)
    image, label = images.plain[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and label in (0, 1)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_a_folder_may_bring_its_own_test_images(tmp_path: Path, model: Any, name: str) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / name, count=2)
    images = open_(tmp_path, model)
    assert (len(images.train), len(images.test)) == (10, 4)


def test_a_folder_of_images_alone_has_no_classes(tmp_path: Path, model: Any) -> None:
    write_folder(tmp_path, classes=("cat",))
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "empty").mkdir()
    images = open_(tmp_path / "cat", model)
    assert (len(images.train), len(images.test), images.classes, images.labelled) == (4, 1, None, False)
    (batch,) = images.calibration(10)
    assert batch.shape == (4, 3, 16, 16)
    assert open_(tmp_path, model).labelled
    digest = images.train.digest()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "5.PNG")
    assert open_(tmp_path / "cat", model).train.digest() != digest


def test_other_classes_in_the_test_folder_are_refused(tmp_path: Path, model: Any) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"classes in .* differ"):
        open_(tmp_path, model)


def test_images_are_normalised_as_timm_recorded(tmp_path: Path, model: Any) -> None:
    images = open_(write_folder(tmp_path), model)
    image, _ = images.plain[0]
    path, _ = images.plain.data.samples[images.plain.indices[0]]
    value = np.asarray(Image.open(path))[0, 0] / 255
    wanted = (value - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
    np.testing.assert_allclose(image.mean(dim=(1, 2)).numpy(), wanted, atol=1e-2)


def test_augmentation_is_for_training_alone(tmp_path: Path, model: Any) -> None:
    images = open_("digits", model, Augmentation())
    with seeded(0):
        first = images.train[0][0]
    with seeded(0):
        assert torch.equal(images.train[0][0], first)
    with seeded(1):
        assert not torch.equal(images.train[0][0], first)
    assert torch.equal(images.plain[0][0], images.plain[0][0])
    assert images.plain.indices == images.train.indices


def test_grey_models_get_grey_images() -> None:
    grey = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=1)
    image, _ = open_("digits", grey).plain[0]
    assert image.shape == (1, 8, 8) and -1 <= float(image.min()) < float(image.max()) <= 1


def test_a_part_of_the_images_is_chosen_by_the_seed(model: Any) -> None:
    source = DataSource(source="digits", train_images=20, test_images=10)
    first, second = (open_images(source, model, seed=seed) for seed in (0, 1))
    assert (len(first.train), len(first.test)) == (20, 10)
    assert first.train.indices != second.train.indices
    assert open_images(source, model).train.indices == first.train.indices


def test_calibration_batches_have_no_labels_and_no_augmentation(model: Any) -> None:
    images = open_("digits", model, Augmentation(), train_images=20)
    batches = list(images.calibration(18, batch_size=8))
    assert [len(batch) for batch in batches] == [8, 8, 2]
    assert torch.equal(batches[1][0], images.plain[8][0])
    assert sum(len(batch) for batch in images.calibration(100)) == 20


def test_torchvision_data_sets_are_opened_by_name(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fake:
        classes = ("a", "b", "c")

        def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
            asked.append((root, train, download))

        def __len__(self) -> int:
            return 3

    monkeypatch.setattr(datasets, "Fake", Fake, raising=False)
    images = open_("torchvision:Fake", model, root=tmp_path / "new")
    assert asked == [(str(tmp_path / "new"), True, True), (str(tmp_path / "new"), False, True)]
    assert images.classes == 3


def test_timm_data_sets_are_opened_by_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gohsp.runs import datasets as data

    def fake(name: str, split: str, **options: Any) -> Any:
        if split == "validation":
            raise ValueError("there is train and test")
        return [(Image.new("L", (9, 9)), 0)] * (5 if split == "train" else 2)

    monkeypatch.setattr(data, "create_dataset", fake)
    images = open_("hfds/somebody/something", model)
    assert (len(images.train), len(images.test), images.classes) == (5, 2, None)


def test_data_sets_without_random_access_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gohsp.runs import datasets as data

    monkeypatch.setattr(data, "create_dataset", lambda name, **options: iter(()))
    with pytest.raises(ValueError, match="random access"):
        open_("hfds/streamed", model)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "wanted a folder of images, torchvision:NAME .* got 'nowhere'"),
        ("torchvision:Nothing", "'Nothing' is no data set with a training and a test part"),
        ("torchvision:FakeData", "no data set with a training and a test part"),
    ],
)
def test_sources_that_are_not_there_are_refused(source: str, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        open_(source, model)


def test_an_empty_folder_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ValueError, match="one subfolder of images a class"):
        open_(tmp_path, model)


def bad_images(folder: Path) -> list[Path]:
    """Write files that are no images, of every kind that was met."""
    paths = [folder / f"{name}.png" for name in ("empty", "text", "cut", "noise", "fifo", "bomb", "float", "folder")]
    empty, text, cut, noise, fifo, bomb, floating, inside = paths
    empty.touch()
    text.write_text("<svg></svg>")
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:1500])
    noise.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    os.mkfifo(fifo)
    Image.new("1", (20000, 20000)).save(bomb)
    Image.new("F", (8, 8)).save(floating, format="TIFF")
    inside.mkdir()
    return [*paths, folder / "missing.png"]


def test_files_that_are_no_images_are_refused_by_name(tmp_path: Path) -> None:
    for path in bad_images(tmp_path):
        with pytest.raises(ValueError, match=f"^data: {path}: wanted an image") as caught:
            read_image(path)
        assert "\n" not in str(caught.value), path


def test_a_bad_image_is_named_by_both_readers(tmp_path: Path, model: Any) -> None:
    bad = write_folder(tmp_path / "images") / "cat" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"^data: {bad}: "):
        list(open_(tmp_path / "images", model).calibration(10))
    with pytest.raises(ValueError, match=f"^data: {bad}: "):
        load_folder(tmp_path / "images", 14, 10, 0)


def read_saved(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    image.save(path, **options)
    found = read_image(path)
    assert found.mode == "RGB"
    return np.asarray(found)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, ending: str) -> None:
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    pixels = read_saved(Image.fromarray(levels), tmp_path / f"grey.{ending}")
    assert pixels[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


def test_integers_of_32_bits_are_refused(tmp_path: Path) -> None:
    Image.new("I", (4, 4), 70000).save(tmp_path / "long.tif")
    with pytest.raises(ValueError, match=r"long\.tif: .*mode I\) have no range"):
        read_image(tmp_path / "long.tif")


def test_the_orientation_of_the_camera_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 3, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    pixels = read_saved(image, tmp_path / "turned.png", exif=exif)
    assert pixels.shape == (2, 3, 3) and (pixels[0] == 0).all() and (pixels[1] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image, options = Image.new("P", (1, 1)), {"transparency": 0}
        image.putpalette([0, 0, 0])
    else:
        image, options = Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert(mode), {}
    assert (read_saved(image, tmp_path / "clear.png", **options) == 255).all()


def test_a_link_to_the_folder_itself_is_refused(tmp_path: Path, model: Any) -> None:
    write_folder(tmp_path / "images")
    (tmp_path / "images" / "cat" / "again").symlink_to(tmp_path / "images" / "dog")
    with pytest.raises(ValueError, match=r"wanted each folder of images once; .* are one, by a link"):
        open_(tmp_path / "images", model)
