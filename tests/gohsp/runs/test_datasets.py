# SPDX-License-Identifier: Apache-2.0
"""Images by name: folders, torchvision, timm, digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision import datasets

from gohsp.recipe import Augmentation, DataSource
from gohsp.runs.datasets import open_images
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
