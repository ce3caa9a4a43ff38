# SPDX-License-Identifier: Apache-2.0
"""The study of training: every method trains, a stopped study goes on, and the table is made of what there is."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bench.harness.results import read_table
from bench.studies import trained
from gohsp.files import write_json
from gohsp.recipe import Recipe, read_recipe
from gohsp.training import checkpoint


@pytest.fixture(scope="module")
def recipe(noise: Path) -> Recipe:
    """Light and dark noise, a tiny model."""
    changes = {
        "model": {"name": "vit_tiny_patch16_224", "image_size": 32, "pretrained": False, "fit_head": 16},
        "data": {"source": str(noise), "train_images": 20, "test_images": 8, "workers": 0},
        "prune": {"images": 8},
        "fit": {"epochs": 3, "batch_size": 10},
    }
    return trained.changed(read_recipe(Path(__file__).parents[3] / trained.RECIPE), changes)


def test_every_method_trains_and_is_as_small_as_asked(recipe: Recipe, tmp_path: Path) -> None:
    methods = [m for m in trained.METHODS if m != "torch-pruning" or importlib.util.find_spec("torch_pruning")]
    trained.run(recipe, methods, [0], tmp_path / "work", tmp_path / "table.csv")  # the dense one, a teacher, leads
    rows = read_table(tmp_path / "table.csv")
    assert [row["method"] for row in rows] == methods
    dense = float(rows[0]["params_m"])
    for row in rows:
        assert len(row["curve"].split()) == 3 and row["curve"].endswith(f"{float(row['top1']):.4f}")
        share = float(row["params_m"]) / dense
        assert share == 1 if row["method"] == "dense" else 0.58 < share <= 0.601


def test_a_stopped_study_goes_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, table = tmp_path / "work", tmp_path / "table.csv"
    trained.run(recipe, ["dense"], [0], work, tmp_path / "whole.csv")
    whole = read_table(tmp_path / "whole.csv")
    (work / "dense-0" / "result.json").unlink()  # what a run that was killed between its end and its result leaves
    trained.run(recipe, ["dense"], [0], work, table)
    assert [row["curve"] for row in read_table(table)] == [row["curve"] for row in whole]
    monkeypatch.setattr(trained, "_run_one", lambda *_: pytest.fail("it has its result"))
    trained.run(recipe, ["dense"], [0], work, table)


def test_a_run_that_goes_on_is_not_judged_again(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    work, table = tmp_path / "work", tmp_path / "table.csv"
    trained.run(recipe, ["dense"], [0], work, table)
    (whole,) = read_table(table)
    (work / "dense-0" / "result.json").unlink()
    monkeypatch.setattr(trained, "evaluate", lambda *_: pytest.fail("it has been judged before training"))
    trained.run(recipe, ["dense"], [0], work, table)
    (again,) = read_table(table)
    assert (again["before"], again["prune_seconds"]) == (whole["before"], whole["prune_seconds"])


def test_a_run_with_other_settings_is_refused_whether_it_has_ended_or_not(recipe: Recipe, tmp_path: Path) -> None:
    work, table = tmp_path / "work", tmp_path / "table.csv"
    trained.run(recipe, ["dense"], [0], work, table)
    before = table.read_bytes()
    changes: list[tuple[str, dict[str, dict[str, Any]]]] = [
        ("fit", {"fit": {"lr": 1e-3}}),
        ("prune", {"prune": {"images": 4}}),
    ]
    for _ in range(2):
        for section, change in changes:
            with pytest.raises(
                ValueError, match=f"dense-0: belongs to a run with another {section}; give the settings"
            ):
                trained.run(trained.changed(recipe, change), ["dense"], [0], work, table)
        (work / "dense-0" / "result.json").unlink(missing_ok=True)
    assert table.read_bytes() == before


def test_what_has_trained_nothing_yet_may_begin_with_other_settings(recipe: Recipe, tmp_path: Path) -> None:
    """As after a run that found no teacher."""
    start = trained.Start({"fit": "another"}, 0.25, 1.0)
    write_json(tmp_path / trained.START, dataclasses.asdict(start))
    assert trained._read_start(tmp_path, recipe) is None


def test_a_result_of_unknown_settings_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "dense-0").mkdir()
    write_json(tmp_path / "dense-0" / "result.json", {})
    with pytest.raises(ValueError, match=r"dense-0: wanted start\.json with the settings of this result, found none"):
        trained.run(recipe, ["dense"], [0], tmp_path, tmp_path / "table.csv")


def test_a_teacher_has_to_be_there(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dense-0: wanted the dense model, trained to its end"):
        trained.run(recipe, ["gohsp-distilled"], [0], tmp_path, tmp_path / "table.csv")


def test_trained_models_are_pruned_and_trained_again(recipe: Recipe, tmp_path: Path) -> None:
    work, table = tmp_path / "work", tmp_path / "again.csv"
    with pytest.raises(FileNotFoundError, match=r"dense-0: wanted the dense model, trained to its end"):
        trained.run(recipe, ["dense"], [0], work, table, again=1)
    trained.run(recipe, ["dense"], [0], work, tmp_path / "first.csv")
    methods = ["dense", "gohsp", "gohsp-distilled", "gohsp-features"]
    trained.run(recipe, methods, [0], work, table, again=1)
    (first,) = read_table(tmp_path / "first.csv")
    dense, *pruned = read_table(table)
    assert dense["before"] == first["top1"]  # it goes on where that one ended
    trained.run(recipe, ["dense"], [0], work, tmp_path / "third.csv", again=2)
    assert read_table(tmp_path / "third.csv")[0]["before"] == dense["top1"]
    assert len({row["before"] for row in pruned}) == 1  # the same model was pruned
    # The teacher's answers made a difference, and its stream another one.
    assert len({tuple(_weights(work / "again" / f"{method}-0")) for method in methods}) == len(methods)


def test_models_are_timed_on_the_kernels(recipe: Recipe, tmp_path: Path) -> None:
    methods = [m for m in trained.METHODS if m != "torch-pruning" or importlib.util.find_spec("torch_pruning")]
    trained.add_times(recipe, methods, tmp_path, tmp_path / "times.csv")
    rows = {row["method"]: row for row in read_table(tmp_path / "times.csv")}
    assert list(rows) == methods and all(float(row["ms"]) > 0 for row in rows.values())
    assert len({row["dense_ms"] for row in rows.values()}) == 1
    assert rows["gohsp"]["ms"] == rows["gohsp-features"]["ms"]  # one model


def _weights(folder: Path) -> list[float]:
    return checkpoint.read(folder / "checkpoint.safetensors").part("model")["head.weight"].flatten().tolist()


def test_unknown_methods_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"methods: wanted some of dense, .*; got snip"):
        trained.run(recipe, ["snip"], [0], tmp_path, tmp_path / "table.csv")
    with pytest.raises(ValueError, match="epochs"):
        trained.changed(recipe, {"fit": {"epochs": -1}})
