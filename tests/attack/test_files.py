# SPDX-License-Identifier: Apache-2.0
"""Files of the library as strangers, crashes and several writers leave them."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import gohsp
from gohsp import files, serialization
from gohsp.files import alone, exclusive, read_json, replacing, write_json
from gohsp.masks.mask import ModelMask
from gohsp.pruning.latency import LatencyTable
from gohsp.serialization import PLAN, WEIGHTS, _digest
from gohsp.training import checkpoint

from .kills import POINTS, in_child, killed_at
from .scale import TIMES


def small(value: float) -> Any:
    """Return a compressed model that can be told from others by the bias of its head, and by its mask."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with torch.no_grad():
        model.head.bias.fill_(value)
    return gohsp.compress(model, ModelMask.keep_first(model, hidden=8 + int(value)))


def value_in(directory: Path) -> float:
    loaded = gohsp.load(directory)
    value = float(loaded.head.bias.detach()[0])
    assert ModelMask.of(loaded).blocks[0].hidden.sum() == 8 + int(value)
    return value


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [small(0), small(1)]


def check_after_a_kill(directory: Path, old: int) -> int:
    found = int(value_in(directory))
    assert found in (old, 1 - old)
    return found


@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, models: list[Any], point: str
) -> None:
    gohsp.save(models[0], tmp_path)
    now, number, seen = 0, 2, set()
    while in_child(partial(killed_at, point, number, partial(gohsp.save, models[1 - now], tmp_path))):
        found = check_after_a_kill(tmp_path, now)
        seen.add(found != now)
        now, number = found, number + 1
    assert number > 4, f"os.{point} is not called"
    gohsp.save(models[now], tmp_path)
    assert sorted(os.listdir(tmp_path)) == [WEIGHTS, PLAN]
    assert value_in(tmp_path) == now
    assert point not in ("replace", "fsync") or seen == {True, False}


def test_kills_at_random_moments(tmp_path: Path, models: list[Any]) -> None:
    gohsp.save(models[0], tmp_path)
    started = time.perf_counter()
    gohsp.save(models[0], tmp_path)
    takes = time.perf_counter() - started
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    draws, now = random.Random(seed), 0
    for _ in range(40 * TIMES):
        in_child(partial(gohsp.save, models[1 - now], tmp_path), kill_after=draws.random() * 1.5 * takes)
        now = check_after_a_kill(tmp_path, now)
    gohsp.save(models[1], tmp_path)
    assert sorted(os.listdir(tmp_path)) == [WEIGHTS, PLAN]
    assert value_in(tmp_path) == 1


def test_a_first_save_that_is_killed_after_its_plan_is_loaded(tmp_path: Path, models: list[Any]) -> None:
    assert in_child(lambda: killed_at("replace", 2 * 3, lambda: gohsp.save(models[1], tmp_path)))
    assert not (tmp_path / WEIGHTS).exists()
    assert value_in(tmp_path) == 1


def test_a_save_that_finds_no_room_leaves_none_of_its_weights_and_what_kills_left_goes_first(
    tmp_path: Path, models: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gohsp.save(models[0], tmp_path)
    assert in_child(lambda: killed_at("replace", 2 * 2, lambda: gohsp.save(models[1], tmp_path)))
    assert len(list(tmp_path.glob(".model.*"))) == 1
    left: list[int] = []

    def full(*arguments: Any, **options: Any) -> None:
        left.append(len(list(tmp_path.glob(".model.*"))))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(serialization, "save_file", full)
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path / WEIGHTS}'$"):
        gohsp.save(models[1], tmp_path)
    assert left == [0]
    monkeypatch.undo()
    monkeypatch.setattr(serialization, "write_json", full)
    with pytest.raises(SafetensorError):
        gohsp.save(models[1], tmp_path)
    assert sorted(os.listdir(tmp_path)) == [WEIGHTS, PLAN] and value_in(tmp_path) == 0


def test_a_thread_that_holds_a_folder_does_not_wait_for_itself(tmp_path: Path, models: list[Any]) -> None:
    def hold() -> None:
        with ThreadPoolExecutor() as elsewhere:
            with alone(tmp_path), alone(tmp_path), exclusive(tmp_path):
                gohsp.save(models[0], tmp_path)
                error = elsewhere.submit(alone(tmp_path).__enter__).exception()
            assert str(error) == f"{tmp_path}: another process or thread works there; wait for its end"
            elsewhere.submit(gohsp.save, models[1], tmp_path).result()

    assert not in_child(hold)  # ends it, should it wait
    assert value_in(tmp_path) == 1


def test_on_windows_nothing_is_locked_and_no_folder_is_opened(
    tmp_path: Path, models: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, os.open refuses folders, fsync what is only read, and there is no fcntl."""
    opened, real_open, real_fsync = {}, os.open, os.fsync

    def open_file(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        handle = real_open(path, flags, *mode, **options)
        opened[handle] = flags
        return handle

    def fsync(handle: int) -> None:
        if not opened[handle] & (os.O_RDWR | os.O_WRONLY):
            raise OSError(9, "Bad file descriptor")
        real_fsync(handle)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    for number in (0, 1):
        gohsp.save(models[number], tmp_path)
        with alone(tmp_path):
            write_json(tmp_path / "x.json", {})
        assert sorted(os.listdir(tmp_path)) == [WEIGHTS, PLAN, "x.json"]
        assert value_in(tmp_path) == number


def test_modules_nested_without_end_are_named(models: list[Any]) -> None:
    model, small = VisionTransformer(16, 8, embed_dim=12, depth=1, num_heads=2), copy.deepcopy(models[0])
    for _ in range(200):
        model.head, small.head = nn.Sequential(model.head), nn.Sequential(small.head)
    images = [torch.zeros(1, 3, 16, 16)]
    calls: dict[str, Callable[[], object]] = {
        "prune": lambda: gohsp.prune(model, images, target={"params": 0.8}),
        "rank": lambda: gohsp.rank_heads(model, images),
        "mask": lambda: ModelMask.full(model),
        "count": lambda: gohsp.count(model),
        "count compressed": lambda: gohsp.count(small),
        "freeze": lambda: gohsp.freeze(small),
        "densify": lambda: gohsp.densify(small),
        "save": lambda: gohsp.save(small, "nowhere"),
        "train": lambda: gohsp.train(small, []),
        "train dense": lambda: gohsp.train(model, []),
    }
    for name, call in calls.items():
        print(name)
        with pytest.raises(ValueError, match="model: wanted at most 64 modules within each other"):
            call()


def test_threads_and_a_reader_in_one_folder(tmp_path: Path, models: list[Any]) -> None:
    gohsp.save(models[0], tmp_path)
    faults: list[BaseException] = []

    def work(model: Any | None) -> None:
        try:
            for _ in range(15):
                value_in(tmp_path) if model is None else gohsp.save(model, tmp_path)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in (*models, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    assert value_in(tmp_path) in (0, 1)
    assert sorted(os.listdir(tmp_path)) == [WEIGHTS, PLAN]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, models: list[Any], mask: int) -> None:
    before = os.umask(mask)
    try:
        gohsp.save(models[0], tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) for name in (PLAN, WEIGHTS)}
    assert modes == {0o666 & ~mask}


def test_links_under_names_that_can_be_guessed_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f".data.{os.getpid()}.tmp.json").symlink_to(victim)
    with replacing(tmp_path / "folder" / "data.json") as temporary:
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        temporary.write_text("{}")
    assert victim.read_text() == "mine"
    with replacing(tmp_path / "folder" / "data.json") as other:
        assert other != temporary
        other.write_text("{}")


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    def die() -> None:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die)
    (left,) = os.listdir(tmp_path)
    with replacing(tmp_path / "b.json") as temporary:
        temporary.write_text("{}")
        write_json(tmp_path / "c.json", {})
        assert not (tmp_path / left).exists()
    assert sorted(os.listdir(tmp_path)) == ["b.json", "c.json"]


@pytest.mark.parametrize("change", ["bit", "nan", "half", "exchanged"])
def test_damage_in_the_weights_is_noticed(tmp_path: Path, models: list[Any], change: str) -> None:
    gohsp.save(models[0], tmp_path)
    path = tmp_path / WEIGHTS
    if change == "bit":
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        metadata = {"plan_sha256": _plan_digest(path)}
        tensors = load_file(path)
        if change == "nan":
            tensors["head.bias"][0] = float("nan")
        elif change == "half":
            tensors["head.bias"] = tensors["head.bias"].half()
        else:
            names = ("blocks.0.norm1.weight", "blocks.1.norm1.bias")
            tensors |= dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        gohsp.load(tmp_path)


def _plan_digest(path: Path) -> str:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header["__metadata__"]["plan_sha256"])


def test_a_loaded_model_and_its_file_are_two(tmp_path: Path, models: list[Any]) -> None:
    gohsp.save(models[0], tmp_path)
    loaded = gohsp.load(tmp_path)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    size = (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * size)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    os.truncate(tmp_path / WEIGHTS, 0)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "levels"),
        ("[" * 100 + "]" * 100, "at most 32 levels"),
        ('{"a": NaN}', "not finite"),
        ('{"a": -Infinity}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        ("9" * 5000, "digits"),
        ("", "wanted JSON"),
        ("\ufeff{}", "wanted JSON"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json: [^\n]*{message}"):
        read_json(path)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: wanted a file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ValueError, match="too long"):
        read_json(tmp_path / ("x" * 5000))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="large: wanted at most 67108864 bytes, got 1099511627776"):
        read_json(tmp_path / "large")


def test_weights_of_a_terabyte_are_not_read(tmp_path: Path, models: list[Any]) -> None:
    gohsp.save(models[0], tmp_path)
    os.truncate(tmp_path / WEIGHTS, 2**40)
    with pytest.raises(ValueError, match=r"model\.safetensors: wanted at most \d+ bytes"):
        gohsp.load(tmp_path)


def _damaged(data: bytes, draws: random.Random) -> bytes:
    """Return a file as a bad disk, a bad transfer or a bad person leaves it."""
    kind = draws.randrange(6)
    at = draws.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << draws.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + draws.randbytes(draws.randrange(1, 9)) + data[at:]
    if kind == 3:
        end = min(len(data), at + draws.randrange(1, 40))
        return data[:at] + data[end:]
    if kind == 4:
        return data[:at] + draws.choice((b"[" * 2000, b"9" * 5000, b"NaN", b"1e999", b"\xff\xff", b"{}")) + data[at:]
    return data + data[at:]


VALUES = (None, True, False, 0, -1, 1, 10**9, 10**30, 0.5, -0.5, 1e300, "", "all", "0-3", "x" * 5000, [], {}, [[]], [1])


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


def _edited(data: Any, draws: random.Random) -> Any:
    """Return JSON that is well formed, with a value of another kind, without one, or with one too many."""
    data = json.loads(json.dumps(data))
    node, key = draws.choice(_places(data))
    kind = draws.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[draws.choice(("extra", "pretrained", "x" * 3000, ""))] = draws.choice(VALUES)
    else:
        node[key] = draws.choice(VALUES)
    return data


def _edited_weights(data: bytes, draws: random.Random) -> bytes:
    """Return a safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(_edited(json.loads(data[8 : 8 + size]), draws)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _check_model(path: Path) -> None:
    model = gohsp.load(path.parent)
    ModelMask.of(model).validate()
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


def _refused_or_valid(read: Callable[[], Any], what: str) -> bool:
    """Return whether a reader refused a file, and insist that it did so in one line."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert type(error) in (ValueError, FileNotFoundError), f"{what}: {type(error)}"
        assert "\n" not in text and len(text) < 1500, f"{what}: {text[:2000]}"
        assert "/" in text, f"{what}: it names no file: {text}"
        return True
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    return False


def _check_mask(path: Path) -> None:
    ModelMask.load(path).validate()


def _check_checkpoint(path: Path) -> None:
    back = checkpoint.read(path)
    assert isinstance(back.stage, str) and back.step >= 0 and isinstance(back.values, dict)


def _check_table(path: Path) -> None:
    table = LatencyTable.load(path)
    assert list(table.mlp) == sorted(table.mlp) and len(table.attention) == table.num_heads


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, models: list[Any]) -> Path:
    """Return a folder with one file of each kind."""
    folder = tmp_path_factory.mktemp("examples")
    gohsp.save(models[0], folder)
    ModelMask.of(models[0]).save(folder / "mask.json")
    tensors = {"model.a": torch.randn(3, 4), "optimizer.state.0.exp_avg": torch.randn(3)}
    values = {"loss": 0.5, "history": [{"epoch": 1, "loss": 2.0}], "settings": {"seed": 0}, "mask": None}
    checkpoint.write(folder / "checkpoint.safetensors", checkpoint.Checkpoint("admm", 7, False, tensors, values))
    sizes = {"dim": 16, "num_heads": 2, "head_dim": 8, "hidden": 64, "batch": 1, "threads": 1, "outside": 1.0}
    LatencyTable(**sizes, attention=(1.0, 2.0), neurons=(16, 64), mlp=(1.0, 2.0)).save(folder / "latency.json")
    return folder


READERS: dict[str, tuple[str, Callable[[Path], Any], int]] = {
    "plan": (PLAN, _check_model, 40),
    "signed plan": (PLAN, _check_model, 60),
    "weights": (WEIGHTS, _check_model, 40),
    "signed weights": (WEIGHTS, _check_model, 40),
    "weights of an earlier version": (WEIGHTS, _check_model, 60),
    "mask": ("mask.json", _check_mask, 80),
    "checkpoint": ("checkpoint.safetensors", _check_checkpoint, 60),
    "latency": ("latency.json", _check_table, 80),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_changed_file_is_refused_in_a_line_or_read_as_something_valid(
    examples: Path, tmp_path: Path, kind: str
) -> None:
    name, read, number = READERS[kind]
    number *= TIMES
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    draws, refused = random.Random(seed), 0
    for index in range(number):
        for file in (PLAN, WEIGHTS, name):
            shutil.copy(examples / file, tmp_path / file)
        if kind == "weights of an earlier version":
            _sign(tmp_path)
        (tmp_path / name).write_bytes(_changed(tmp_path / name, draws, edited=index % 2 == 0))
        if kind.startswith("signed"):
            _sign(tmp_path)
        refused += _refused_or_valid(partial(read, tmp_path / name), f"seed {seed}, file {index}")
    assert refused > number // 8


def _changed(path: Path, draws: random.Random, edited: bool) -> bytes:
    data = path.read_bytes()
    if not edited:
        return _damaged(data, draws)
    return (
        json.dumps(_edited(json.loads(data), draws)).encode()
        if path.suffix == ".json"
        else _edited_weights(data, draws)
    )


def _sign(directory: Path) -> None:
    """Have plan and weights vouch for each other again, where they can be read at all: whoever edits them can."""
    try:
        plan = json.loads((directory / PLAN).read_text())
        plan.pop("tensors_sha256", None)
        tensors = load_file(directory / WEIGHTS)
        save_file(tensors, directory / WEIGHTS, metadata={"plan_sha256": _digest(plan)})
        (directory / PLAN).write_text(json.dumps(plan))
    except Exception as error:
        print("not signed:", type(error).__name__)
