# SPDX-License-Identifier: Apache-2.0
"""Choice of tiles: the rule, the files of measured ones, and the tuner with a stopwatch that is made up."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from gohsp_kernels import tune
from gohsp_kernels.triton import config, tuned
from gohsp_kernels.triton.config import AttentionTile, Target, Tile
from gohsp_kernels.tune import AttentionShape, LinearShape

H100 = Target("cuda", 90, 132, "NVIDIA H100 80GB HBM3")
HALF = torch.float16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and no choice remembered from elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (tuned.tiles, config.linear_tile, config.attention_tile)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_large_shapes_take_large_tiles_and_small_ones_fill_the_device() -> None:
    sizes = [config.linear_tile(H100, HALF, rows, 768, 384, False).BLOCK_M for rows in (12608, 4096, 1576, 197)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 128 and sizes[-1] == 16
    for rows in (12608, 4096, 1576):
        tile = config.linear_tile(H100, HALF, rows, 768, 384, False)
        assert config.cdiv(rows, tile.BLOCK_M) * config.cdiv(768, tile.BLOCK_N) >= H100.processors


def test_column_lists_take_the_second_tile() -> None:
    plain, indexed = (config.linear_tile(H100, HALF, 10**5, 768, 384, flag) for flag in (False, True))
    assert (plain.BLOCK_M, plain.BLOCK_N) == (128, 128) and (indexed.BLOCK_M, indexed.BLOCK_N) == (128, 64)


def test_steps_of_keys_pad_little() -> None:
    def step(tokens: int) -> int:
        return config.attention_tile(H100, HALF, tokens, tokens, 64, True).BLOCK_N

    assert (step(197), step(256), step(50), step(577)) == (32, 64, 64, 64)
    assert config.attention_tile(H100, HALF, 1, 197, 64, True).BLOCK_M == 16


def test_every_choice_of_the_rule_is_compiled_by_the_aot_tests() -> None:
    """The ladder is what tests/gohsp_kernels/triton/aot.py goes through; the rule may choose nothing else."""
    for arch in (80, 90, 100):
        target = Target("cuda", arch, 100)
        for rows in (1, 17, 197, 1000, 5000, 10**6):
            for indexed in (False, True):
                for dtype in (HALF, torch.float32):
                    tile = config.linear_tile(target, dtype, rows, 768, 384, indexed)
                    assert tile in config.tile_ladder(target, dtype.itemsize)


def test_keys_join_near_shapes_and_part_others() -> None:
    key = tuned.linear_key(HALF, 12608, 768, 384, False)
    assert key == "linear float16 16384 768x384"
    assert tuned.linear_key(HALF, 9000, 705, 330, False) == key
    others = [
        tuned.linear_key(torch.bfloat16, 12608, 768, 384, False),
        tuned.linear_key(HALF, 197, 768, 384, False),
        tuned.linear_key(HALF, 12608, 768, 384, True),
        tuned.attention_key(HALF, 197, 197, 64, True),
        tuned.attention_key(HALF, 1, 197, 64, True),
        tuned.attention_key(HALF, 197, 197, 64, False),
    ]
    assert len({key, *others}) == 7


def test_measured_tiles_go_before_the_rule_and_shipped_ones_before_the_users(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rule = config.linear_tile(H100, HALF, 12608, 768, 384, False)
    mine, shipped = Tile(64, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)
    assert by_rule not in (mine, shipped)
    key = tuned.linear_key(HALF, 12608, 768, 384, False)

    def chosen() -> Tile:
        config.linear_tile.cache_clear()
        return config.linear_tile(H100, HALF, 12608, 768, 384, False)

    path = tuned.save(H100.name, {key: mine.meta}, {})
    assert path.parent == own_cache / "gohsp_kernels" / "tiles"
    assert path.name.startswith("NVIDIA_H100_80GB_HBM3_triton_")
    assert chosen() == mine
    assert config.linear_tile(Target("cuda", 90, 132, "another"), HALF, 12608, 768, 384, False) == by_rule

    monkeypatch.setattr(tuned, "SHIPPED", own_cache)
    (own_cache / path.name).write_text(json.dumps({"tiles": {key: shipped.meta}}))
    tuned.tiles.cache_clear()
    assert chosen() == shipped


def test_saving_keeps_other_entries() -> None:
    tuned.save("gpu", {"a": {"BLOCK_M": 1}}, {"triton": "1"})
    path = tuned.save("gpu", {"b": {"BLOCK_M": 2}}, {"triton": "2"})
    written = json.loads(path.read_text())
    assert written["tiles"] == {"a": {"BLOCK_M": 1}, "b": {"BLOCK_M": 2}} and written["triton"] == "2"
    assert {p.name for p in path.parent.iterdir()} == {path.name, path.with_suffix(".lock").name}


KEY = tuned.linear_key(HALF, 12608, 768, 384, False)
MINE = Tile(64, 32, 32, 4, 2)


def chosen() -> Tile:
    """What the rule or the user's file gives a process that has just begun."""
    tuned.tiles.cache_clear()
    config.linear_tile.cache_clear()
    return config.linear_tile(H100, HALF, 12608, 768, 384, False)


@pytest.mark.parametrize(
    "text", ["", "not json", '{"tiles": {"linear', "[]", '{"tiles": [1]}', '{"tiles": {"a": 1}}', "[" * 10**5, "\0\xff"]
)
def test_a_damaged_file_ends_no_call_and_is_replaced(text: str, caplog: pytest.LogCaptureFixture) -> None:
    by_rule = chosen()
    path = tuned.save(H100.name, {KEY: MINE.meta}, {})
    assert chosen() == MINE
    path.write_bytes(text.encode("latin-1"))
    assert chosen() == by_rule
    for _ in range(3):
        config.linear_tile(H100, HALF, 197, 768, 384, False)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"{path} is left out: wanted a file that ")
    tuned.save(H100.name, {KEY: MINE.meta}, {})
    assert chosen() == MINE


@pytest.mark.parametrize(
    "change",
    [{"split_k": 2}, {"BLOCK_M": 48}, {"BLOCK_M": "64"}, {"BLOCK_M": 64.0}, {"BLOCK_N": 8}, {"BLOCK_K": 2**20},
     {"num_warps": 64}, {"num_warps": 3}, {"num_stages": 0}, {"num_stages": True}, {"BLOCK_M": None}],
)  # fmt: skip
def test_an_entry_that_is_no_tile_is_left_out(change: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    by_rule = chosen()
    entry = {name: size for name, size in {**MINE.meta, **change}.items() if size is not None}
    tuned.save(H100.name, {KEY: entry}, {})  # type: ignore[dict-item]
    assert chosen() == by_rule
    assert len(caplog.messages) == 1 and "is left out: wanted sizes BLOCK_M, BLOCK_N" in caplog.messages[0]
    tuned.save(H100.name, {KEY: MINE.meta}, {})
    assert chosen() == MINE


def test_what_another_triton_measured_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    by_rule = chosen()
    mine = tuned.save(H100.name, {KEY: MINE.meta}, {})
    for module, name, value in ((triton, "__version__", "3.99.0"), (tuned, "REVISION", tuned.REVISION + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert chosen() == by_rule
            assert tuned.save(H100.name, {}, {}) != mine  # and does not touch it
    assert chosen() == MINE


def test_processes_that_save_at_once_lose_nothing() -> None:
    def save(n: int) -> None:
        for i in range(20):
            tuned.save("gpu", {f"{n} {i}": {"BLOCK_M": 16}}, {})

    fork = multiprocessing.get_context("fork")  # they only write files, and would take seconds to start otherwise
    running = [fork.Process(target=save, args=(n,)) for n in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    assert len(tuned.tiles("gpu")) == 80


def test_candidates_fit_the_device() -> None:
    shape = LinearShape(12608, 384, 768, True)
    for target, limit in ((H100, 227), (Target("cuda", 89, 128), 99), (Target("hip", "gfx942", 304), 64)):
        tiles = list(shape.candidates(target, HALF))
        assert len(tiles) > 20
        assert all((t.BLOCK_M + t.BLOCK_N) * t.BLOCK_K * t.num_stages * 2 <= limit * 1024 for t in tiles)
    assert {t.BLOCK_M for t in LinearShape(1, 384, 768, True).candidates(H100, HALF)} == {16}
    assert AttentionTile(64, 64, 4, 2) in list(AttentionShape(8, 197, 4, 64).candidates(H100, HALF))


def test_what_is_measured_is_kept_when_the_rest_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = LinearShape(1, 64, 64, True), LinearShape(1, 64, 128, True)

    def best(shape: tune.Shape, *_: object) -> Tile:
        if shape is second:
            raise RuntimeError("the GPU fell off the bus")
        return Tile(16, 32, 32, 4, 2)

    monkeypatch.setattr(tune, "best", best)
    monkeypatch.setattr(Target, "of", lambda _: H100)
    with pytest.raises(RuntimeError, match="fell off"):
        tune.tune([first, second], CPU, [HALF], write=lambda line: None)
    assert tuned.lookup(H100.name, first.key(HALF), config.TILE_FIELDS) == Tile(16, 32, 32, 4, 2).meta


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "shape", [LinearShape(40, 48, 64, True), LinearShape(40, 48, 64, False), AttentionShape(1, 9, 2, 16)]
)
def test_the_fastest_tile_is_chosen_and_written(shape: tune.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch that likes one tile, hates some, and runs out of shared memory on others."""
    candidates = list(shape.candidates(H100, HALF))[:4]
    monkeypatch.setattr(type(shape), "candidates", lambda *_: iter(candidates))
    monkeypatch.setattr(Target, "of", lambda _: H100)
    times = iter([3.0, 5.0, 2.0, None, 4.0])

    def stopwatch(run: tune.Run) -> float:
        run()
        time = next(times)
        if time is None:
            raise OutOfResources(1, 0, "shared memory")
        return time

    lines: list[str] = []
    tune.tune([shape, shape], CPU, [HALF], stopwatch, lines.append)
    assert len(lines) == 1 and lines[0].endswith(f"in {tuned.file_name(H100.name)}")
    assert tuned.tiles(H100.name)[shape.key(HALF)] == candidates[1].meta
    assert shape.default(H100, HALF) == candidates[1]


@pytest.mark.slow
def test_without_a_gpu_it_lists_what_it_would_try() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gohsp_kernels.tune"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("No GPU here, so nothing is measured.")
    assert "linear bfloat16 16384 768x384: " in run.stdout and " tiles, by rule Tile(" in run.stdout
