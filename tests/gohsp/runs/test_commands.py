# SPDX-License-Identifier: Apache-2.0
"""The commands rank, prune, train, evaluate and report, from one to the next on a small model and digits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import _registry, register_model
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner, Result

import gohsp
from gohsp.files import alone
from gohsp.recipe import ModelSource, read_recipe
from gohsp.runs.directory import RunDirectory, open_model, read_scores
from gohsp.runs.report import Row, draw, markdown
from gohsp_command.cli import app

Call = Callable[..., Result]
NAME = "commands_vit_tiny"


def commands_vit_tiny(pretrained: bool = False, img_size: int = 8, num_classes: int = 10, **timm_options: Any) -> Any:
    """Two blocks of 4 heads x 8 on 32 features."""
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 4}
    return VisionTransformer(img_size=img_size, num_classes=num_classes, **sizes)


@pytest.fixture(scope="module", autouse=True)
def _small_model_in_timm() -> Any:
    register_model(commands_vit_tiny)
    yield
    del _registry._model_entrypoints[NAME]


@pytest.fixture
def call() -> Call:
    def invoke(*arguments: object) -> Result:
        environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)

    return invoke


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = {
        "model": {"name": NAME, "pretrained": False},
        "data": {"source": "digits", "train_images": 64, "test_images": 40, "workers": 0},
        "prune": {"target": {"params": 0.7}, "images": 32},
        "augment": None,
        "fit": {"epochs": 1, "batch_size": 16, "lr": 1e-3, "warmup_epochs": 0, "mixup": 0, "cutmix": 0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, message: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    line = result.stderr.removesuffix("\n")
    assert message in line and line.startswith("gohsp") and "\n" not in line
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_each_command_goes_on_from_the_one_before(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    assert "gohsp prune --out" in done(call("rank", "--recipe", recipe, *out)).replace("\n", " ")
    first = read_scores(run.scores)
    assert [float(block.sum()) for block in first] == pytest.approx([1, 1])
    assert "% of the parameters" in done(call("prune", *out))
    assert all(torch.allclose(a, b) for a, b in zip(first, read_scores(run.scores), strict=True))
    pruned = gohsp.load(run.pruned)
    assert gohsp.ModelMask.of(pruned).blocks == gohsp.ModelMask.load(run.mask).blocks
    assert "finetune" in done(call("train", *out, "--epochs", 2))
    trained = gohsp.load(run.model)
    assert gohsp.ModelMask.of(trained).blocks == gohsp.ModelMask.load(run.mask).blocks
    assert not torch.equal(trained.head.weight, pruned.head.weight)
    assert read_recipe(run.recipe).fit.epochs == 2
    assert "model: top-1" in done(call("evaluate", *out))
    found = json.loads(run.evaluation.read_text())
    assert found["params"] == sum(p.numel() for p in trained.parameters()) and found["images"] == 40

    dense = tmp_path / "dense"
    assert "dense: top-1" in done(call("evaluate", "--recipe", recipe, "--out", dense))
    markdown, picture = tmp_path / "report.md", tmp_path / "report.svg"
    output = done(call("report", dense, run.directory, "--out", markdown, "--picture", picture, "--rounds", 2))
    assert "ms" in output
    lines = markdown.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| run"]
    assert lines[2].endswith("| 1.00 |") and f"{found['top1']:.2%}" in lines[3]
    assert picture.read_text().lstrip().startswith("<?xml")


def test_pruning_takes_the_scores_of_rank_and_ranks_again_where_they_are_of_another_ranking(
    call: Call, recipe: Path, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    done(call("rank", "--recipe", recipe, *out))
    stored = json.loads(run.scores.read_text())
    stored["scores"] = [[0.0, 0.0, 0.0, 1.0]] * 2  # a ranking of one's own: the last head above all
    run.scores.write_text(json.dumps(stored))
    done(call("prune", *out, "--groups", "heads", "--target", "params=0.85"))
    for block in gohsp.ModelMask.load(run.mask).blocks:
        assert block.heads[3] and not block.heads.all()
    assert json.loads(run.scores.read_text()) == stored
    done(call("prune", *out, "--images", 16))
    again = json.loads(run.scores.read_text())
    assert again["ranked"] != stored["ranked"] and again["scores"] != stored["scores"]


def test_the_runs_seed_is_that_of_pruning(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, prune = [], gohsp.prune

    def record(*arguments: Any, **options: Any) -> gohsp.PruneResult:
        seeds.append(options["seed"])
        return prune(*arguments, **options)

    monkeypatch.setattr(gohsp, "prune", record)
    done(call("prune", "--recipe", recipe, "--out", tmp_path / "run", "--seed", 3))
    assert seeds == [3]


def test_training_prunes_first_where_nothing_was_pruned_and_by_admm_if_asked(
    call: Call, recipe: Path, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    output = done(call("train", "--recipe", recipe, "--out", run.directory, "--admm-epochs", 2, "--distill", "soft"))
    assert "admm" in output and "finetune" in output
    plan, trained = gohsp.ModelMask.load(run.mask), gohsp.ModelMask.of(gohsp.load(run.model))
    for wanted, block in zip(plan.blocks, trained.blocks, strict=True):
        assert (wanted.heads.sum(), wanted.hidden.sum()) == (block.heads.sum(), block.hidden.sum())


def test_a_run_that_is_over_is_not_trained_again(call: Call, recipe: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    done(call("train", "--recipe", recipe, *out))
    first = load_file(tmp_path / "run" / "model" / "model.safetensors")
    done(call("train", *out))
    second = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    refused(call("train", *out, "--lr", 0.5), "belongs to a run with another fit")


def test_options_override_the_recipe_and_are_remembered(call: Call, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("--target", "macs=0.8", "--groups", "hidden", "--images", 16, "--seed", 3, "--method", "l2")
    done(call("prune", "--recipe", recipe, "--out", out, *arguments))
    kept = read_recipe(out / "recipe.yaml")
    assert (kept.prune.target, kept.prune.groups, kept.prune.images) == ({"macs": 0.8}, ("hidden",), 16)
    assert (kept.seed, kept.prune.method) == (3, "l2")
    assert all(block.heads.all() for block in gohsp.ModelMask.load(out / "mask.json").blocks)


def test_a_saved_model_is_evaluated_by_its_directory(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    done(call("prune", "--recipe", recipe, "--out", run.directory))
    output = done(call("evaluate", "--recipe", recipe, "--model", run.pruned, "--out", tmp_path / "other"))
    assert "compressed: top-1" in output
    output = done(call("evaluate", "--out", run.directory))
    assert "pruned: top-1" in output
    refused(call("rank", "--recipe", recipe, "--model", run.pruned, "--out", tmp_path / "third"), "already compressed")


def test_local_weights_are_read_with_their_classes(tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    back = open_model(ModelSource(name=NAME, checkpoint=tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize("key", ["", "model", "state_dict", "model_ema"])
def test_local_weights_of_torch_are_read_as_timm_reads_them(tmp_path: Path, key: str) -> None:
    state = timm.create_model(NAME, num_classes=7).state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}  # as DistributedDataParallel names them
    others = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save(wrapped if not key else {"model": others, key: wrapped, "epoch": 3}, tmp_path / "w.pth")
    back = open_model(ModelSource(name=NAME, checkpoint=tmp_path / "w.pth")).state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


class Harmful:
    """What runs code where a pickle is believed."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (Harmful(), "wanted weights that torch.save wrote, but"),
        (b"junk", "wanted weights that torch.save wrote, but"),
        ({"epoch": 3}, "wanted a state_dict, or one under 'state_dict' or 'model'"),
        ({"model": {"other": torch.ones(2)}}, "model: timm could not make"),
    ],
)
def test_files_that_hold_other_things_than_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if isinstance(held, bytes):
        path.write_bytes(held)
    else:
        torch.save(held, path)
    with pytest.raises(ValueError, match=message) as caught:
        open_model(ModelSource(name=NAME, checkpoint=path))
    assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()


def test_models_in_folders_of_timm_are_opened(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7)
    timm.models.save_for_hf(model, tmp_path)
    back = open_model(ModelSource(name=f"local-dir:{tmp_path}"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_a_folder_of_images_alone_is_enough_to_rank_and_to_prune(call: Call, tmp_path: Path) -> None:
    folder, run = tmp_path / "images", RunDirectory(tmp_path / "run")
    folder.mkdir()
    for index in range(10):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
    done(call("rank", "--model", NAME, "--no-pretrained", "--data", folder, "--out", run.directory))
    done(call("prune", "--out", run.directory, "--target", "params=0.8"))
    assert gohsp.load(run.pruned).num_classes == 10
    for verb in ("train", "evaluate"):
        refused(call(verb, "--out", run.directory), "needs classes, so wanted a folder with one subfolder of images")


def test_random_weights_are_the_same_each_time() -> None:
    first, second, third = (open_model(ModelSource(name=NAME, pretrained=False), seed) for seed in (0, 0, 1))
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, third.head.weight)


def test_a_fitted_classifier_is_kept_beside_the_run(call: Call, recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["model"]["fit_head"] = 64
    recipe.write_text(yaml.safe_dump(values))
    output = done(call("evaluate", "--recipe", recipe, "--out", tmp_path / "run"))
    assert "fitted in closed form on 64" in output
    # Of random features, but far from one in ten.
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["top1"] > 0.4
    head = (tmp_path / "run" / "head.safetensors").read_bytes()
    done(call("evaluate", "--out", tmp_path / "run"))
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == head


@pytest.mark.parametrize("verb", ["rank", "prune", "train", "evaluate", "report"])
def test_help_teaches_by_an_example(call: Call, verb: str) -> None:
    output = done(call(verb, "--help"))
    assert f"gohsp {verb} " in output.split("Options")[0].split("Usage", 1)[1].split("\n", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("prune", "--data", "digits"), "gohsp-run holds no run yet; wanted --model, or a file (--recipe)", 2),
        (("train",), "gohsp-run holds no run yet; wanted --model and --data, or a file (--recipe)", 2),
        (("rank", "--model", "resnet18", "--no-pretrained", "--data", "digits"), "timm.models.resnet.ResNet", 1),
        (("prune", "--recipe", "."), ".: wanted a file", 2),
        (("prune", "--recipe", "deep.yaml"), "deep.yaml: wanted YAML, but it is nested deeper than 20 levels", 2),
        (("prune", "--out", "file"), "file: File exists", 1),
        (("prune", "--out", "file/under"), "file/under: Not a directory", 1),
        (("prune", "--out", "n" * 300), "File name too long", 1),
        (("prune", "--image-size", 3), f"image_size: wanted at least one patch of {NAME}, got 3 pixels", 1),
        (("prune", "--image-size", 100000), "model.image_size: Input should be less than or equal to 4096", 2),
        (("prune", "--seed", 2**64), "Invalid value for '--seed'", 2),
        (("prune", "--nonsense"), "No such option", 2),
        (("nonsense",), "No such command", 2),
        (("report",), "Missing argument", 2),
        (("prune", "--target", "params"), "KIND=SHARE", 2),
        (("prune", "--model", "no_such_vit", "--data", "digits"), "no_such_vit is no directory that gohsp.save", 1),
        (("prune", "--recipe", "none.yaml"), "none.yaml", 2),
        (("prune", "--model", NAME, "--no-pretrained", "--data", "nowhere"), "data: wanted a folder of images", 1),
        (
            ("prune", "--model", NAME, "--data", "digits", "--checkpoint", "w.onnx"),
            "that ends with .safetensors, .pth",
            1,
        ),
        (("prune", "--model", NAME, "--data", "digits", "--checkpoint", "w.safetensors"), "there is no file", 1),
        (("prune", "--model", NAME, "--data", "digits", "--checkpoint", "w.pth"), "there is no file", 1),
        (("prune", "--model", "local-dir:none", "--data", "digits"), "timm could not make local-dir:none", 1),
        (("prune", "--model", "somebody/vit", "--data", "digits"), "write hf-hub:... or local-dir:...", 1),
        (("prune", "--model", NAME, "--data", "digits", "--no-pretrained", "--target", "params=7"), "target", 1),
        (("report", "nothing-here"), "wanted a run that was evaluated", 1),
    ],
)
def test_mistakes_are_answered_in_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    if "--out" in arguments or "--image-size" in arguments:
        arguments = (arguments[0], "--model", NAME, "--data", "digits", "--no-pretrained", *arguments[1:])
    refused(call(*arguments), message, status)


def test_a_full_disk_is_one_line_that_names_the_directory(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise errors.pop()

    errors = [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device")]
    monkeypatch.setattr(gohsp, "save", full)
    out = tmp_path / "run"
    refused(call("prune", "--recipe", recipe, "--out", out), f"{out}: No space left on device")
    refused(call("prune", "--recipe", recipe, "--out", out), f"{out}: SafetensorError: I/O error: No space left")


def test_two_commands_do_not_work_in_one_folder(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with alone(run), ThreadPoolExecutor() as elsewhere:
        refused(
            elsewhere.submit(call, "prune", "--recipe", recipe, "--out", run).result(),
            f"{run}: another process or thread works there",
        )
        assert list(run.iterdir()) == []
    done(call("prune", "--recipe", recipe, "--out", run))


def test_with_debug_a_failure_shows_where(call: Call, recipe: Path, tmp_path: Path) -> None:
    result = call("--debug", "train", "--recipe", recipe, "--data", "nowhere", "--out", tmp_path / "run")
    assert result.exit_code == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("gohsp train: data: wanted a folder")


def test_ctrl_c_is_one_line(call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gohsp, "prune", interrupt)
    result = call("prune", "--recipe", recipe, "--out", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (130, "gohsp: interrupted\n")


def test_a_terminated_command_unwinds(call: Call, recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def terminate(*arguments: Any, **options: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            unwound.append(True)

    unwound: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gohsp, "prune", terminate)
    result = call("prune", "--recipe", recipe, "--out", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (143, "gohsp: terminated\n")
    assert unwound and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["a[red]b", "[bold]", "x[/y]z"])
def test_names_in_brackets_are_printed_as_they_are(call: Call, recipe: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    assert f"wrote {out}/mask.json and {out}/pruned" in done(call("prune", "--recipe", recipe, "--out", out))
    done(call("evaluate", "--out", out))
    assert out.name in done(call("report", out, "--rounds", 0))
    missing = tmp_path / "run" / name
    refused(call("rank", "--recipe", recipe, "--out", tmp_path / "run", "--data", missing), f"got '{missing}'")


def test_a_folder_in_brackets_is_printed_as_it_is(call: Call, recipe: Path, tmp_path: Path, folders: list[str]) -> None:
    (tmp_path / "[").mkdir()
    folder = Path(folders[0]).rename(tmp_path / "[" / "]i")
    output = done(call("rank", "--recipe", recipe, "--out", tmp_path / "run", "--data", folder))
    assert str(folder) in output.replace("\n", "")


@pytest.mark.parametrize(
    "wrong", [("--method", "best"), ("--groups", "hands"), ("--target", "params=7"), ("--data", "nowhere")]
)
def test_a_wrong_option_is_not_remembered(call: Call, recipe: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    run = RunDirectory(tmp_path / "run")
    refused(call("prune", "--recipe", recipe, "--out", run.directory, *wrong), wrong[0].removeprefix("--"))
    assert not run.recipe.is_file()
    done(call("prune", "--recipe", recipe, "--out", run.directory))
    before = run.recipe.read_bytes()
    refused(call("prune", "--out", run.directory, *wrong), wrong[0].removeprefix("--"))
    assert run.recipe.read_bytes() == before


def test_a_recipe_that_does_not_change_is_not_written_again(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    done(call("evaluate", "--recipe", recipe, "--out", run.directory))
    written = run.recipe.read_text() + "# a remark of mine"
    run.recipe.write_text(written)
    done(call("evaluate", "--out", run.directory))
    assert run.recipe.read_text() == written
    run.recipe.write_text("[")
    refused(call("evaluate", "--out", run.directory), f"{run.recipe}: wanted YAML", 2)
    done(call("evaluate", "--out", run.directory, "--recipe", recipe))
    assert read_recipe(run.recipe).model.name == NAME


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(call: Call, recipe: Path, tmp_path: Path, folders: list[str], workers: int) -> None:
    arguments = ("--recipe", recipe, "--data", folders[0], "--out", tmp_path / "run")
    for path in Path(folders[0], "dark").iterdir():
        path.write_text("no image")
    result = call("evaluate", *arguments, "--workers", workers)
    refused(result, ": wanted an image, got something that Pillow does not know")
    assert result.stderr.startswith(f"gohsp evaluate: data: {folders[0]}/dark/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"what": "../../elsewhere"}, "what: Input should be 'model', 'pruned', 'compressed' or 'dense'"),
        ({"params": 0}, "params: Input should be greater than 0"),
        ({"macs": "many"}, "macs: Input should be a valid integer"),
        ({"top1": "high"}, "top1: Input should be"),
        ({"top2": 1}, "top2: Extra inputs"),
    ],
)
def test_a_damaged_evaluation_is_named(call: Call, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = RunDirectory(tmp_path).evaluation
    good = {"what": "pruned", "params": 1, "macs": 1, "top1": 0.5, "loss": 1.0, "images": 1}
    path.write_text(json.dumps(good))
    done(call("report", tmp_path, "--rounds", 0))
    path.write_text(json.dumps(good | change))
    refused(call("report", tmp_path, "--rounds", 0), f"{path}: wanted what gohsp evaluate writes, but {message}")


def test_names_in_a_report_are_no_markdown(tmp_path: Path) -> None:
    row = Row("a|b`c <b> [x](y)\n$z$", "dense", 1, 1, 0.5, 1)
    cells = markdown([row]).splitlines()[2]
    assert cells.startswith(r"| a\|b\`c \<b\> \[x\](y) \$z\$ | dense |")
    draw([Row(r"$\frac$", "dense", 1, 1, 0.5, 1)], tmp_path / "picture.svg")
    assert r"$\frac$" in (tmp_path / "picture.svg").read_text()


def test_a_damaged_classifier_is_named(call: Call, recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["model"]["fit_head"] = 32
    recipe.write_text(yaml.safe_dump(values))
    run = RunDirectory(tmp_path / "run")
    done(call("evaluate", "--recipe", recipe, "--out", run.directory))
    for write in (lambda: run.head.write_bytes(b"x"), lambda: save_file({"w": torch.zeros(1)}, run.head)):
        write()
        refused(call("evaluate", "--out", run.directory), f"{run.head}: wanted a classifier of 10 classes")


def test_a_target_in_time_is_measured_once(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"dim": 32, "num_heads": 4, "head_dim": 8, "hidden": 128, "batch": 1, "threads": 1, "outside": 0.5}
    steps = {"attention": (1.0, 2.0, 3.0, 4.0), "neurons": (32, 64, 96, 128), "mlp": (1.0, 2.0, 3.0, 4.0)}
    measured = []

    def measure(model: Any) -> gohsp.LatencyTable:
        measured.append(model)
        return gohsp.LatencyTable.model_validate(size | steps)

    monkeypatch.setattr(gohsp.LatencyTable, "measure", measure)
    run = RunDirectory(tmp_path / "run")
    for share in (0.6, 0.8):
        result = call("prune", "--recipe", recipe, "--out", run.directory, "--target", f"ms={share}")
        assert result.exit_code == 0, result.output
        mask = gohsp.ModelMask.load(run.mask)
        ms = 0.5 + sum(int(block.heads.sum()) + int(block.hidden.sum()) / 32 for block in mask.blocks)
        assert 0.75 * share * 16.5 < ms <= share * 16.5
    assert len(measured) == 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        output = done(call("prune", "--out", run.directory))
    finally:
        torch.set_num_threads(threads)
    assert f"threads ({threads}, not {threads + 1})" in output and len(measured) == 2
    (run.directory / "made.json").unlink()
    assert f"{run.latency} is measured anew: there is no record" in done(call("prune", "--out", run.directory))
    assert len(measured) == 3 and gohsp.LatencyTable.load(run.latency).mlp == steps["mlp"]


def test_training_by_admm_needs_counts(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    done(call("prune", "--recipe", recipe, "--out", run.directory))
    run.mask.unlink()
    refused(call("train", "--out", run.directory, "--admm-epochs", 1), "it has no mask.json")


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two folders of images of the same names, dark and light, whose classes are exchanged in the second."""
    for folder, values in (("one", (20, 230)), ("two", (230, 20))):
        for label, value in zip(("dark", "light"), values, strict=True):
            (tmp_path / folder / label).mkdir(parents=True)
            for index in range(20):
                image = Image.fromarray(np.full((8, 8, 3), value + index % 5, dtype=np.uint8))
                image.save(tmp_path / folder / label / f"{index}.png")
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_a_classifier_of_other_images_is_fitted_anew(
    call: Call, recipe: Path, tmp_path: Path, folders: list[str]
) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["model"]["fit_head"] = 32
    recipe.write_text(yaml.safe_dump(values))
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    assert "made anew" not in done(call("evaluate", "--recipe", recipe, "--data", folders[0], *out))
    assert json.loads(run.evaluation.read_text())["top1"] == 1
    output = done(call("evaluate", "--data", folders[1], *out))
    assert f"{run.head} is made anew: it was made with another data" in output
    assert json.loads(run.evaluation.read_text())["top1"] == 1
    assert "made anew" not in done(call("evaluate", *out, "--data", os.path.relpath(folders[1])))
    assert "seed" not in done(call("evaluate", *out)) and "training images" in done(call("prune", "--seed", 1, *out))
    (run.directory / "made.json").unlink()
    assert "there is no record of what it was made from" in done(call("evaluate", *out))


def test_a_classifier_of_another_number_of_classes_is_fitted_anew(
    call: Call, recipe: Path, tmp_path: Path, folders: list[str]
) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["model"]["fit_head"] = 32
    recipe.write_text(yaml.safe_dump(values))
    done(call("evaluate", "--recipe", recipe, "--out", tmp_path / "run"))
    assert "another classes (10, not 2)" in done(call("evaluate", "--out", tmp_path / "run", "--data", folders[0]))


def test_a_model_that_was_trained_from_another_pruning_is_left_out(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    done(call("train", "--recipe", recipe, *out))
    assert "model: top-1" in done(call("evaluate", *out))
    done(call("prune", "--target", "params=0.5", *out))
    refused(call("report", run.directory, "--rounds", 0), f"{run.evaluation}: is of another model than is there now")
    output = done(call("evaluate", *out))
    assert f"{run.model} was not trained from {run.pruned}" in output and "pruned: top-1" in output
    refused(call("train", *out), f"{run.checkpoint}: is of a training that began with another pruned")
    run.checkpoint.unlink()
    done(call("train", *out))
    output = done(call("evaluate", *out))
    assert "left out" not in output and "model: top-1" in output
    done(call("report", run.directory, "--rounds", 0))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--seed", 1), "another seed (0, not 1)"),
        (("--data", "one"), "another data"),
        (("--image-size", 16), "another image shape ([3, 8, 8], not [3, 16, 16])"),
    ],
)
def test_what_was_pruned_with_something_else_is_not_trained(
    call: Call, recipe: Path, tmp_path: Path, folders: list[str], options: tuple[str, Any], reason: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    options = ("--data", folders[0]) if options[0] == "--data" else options
    done(call("prune", "--recipe", recipe, "--out", run.directory))
    result = call("train", "--out", run.directory, *options)
    refused(result, f"{run.pruned}: it was made with another ")
    assert reason in result.stderr


def test_a_pruned_model_is_not_evaluated_in_the_place_of_another(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    done(call("prune", "--recipe", recipe, "--out", run.directory))
    timm.create_model(NAME)
    save_file(timm.create_model(NAME).state_dict(), tmp_path / "w.safetensors")
    output = call("evaluate", "--out", run.directory, "--checkpoint", tmp_path / "w.safetensors")
    refused(output, f"{run.pruned}: it was made with another weights")


def test_a_mask_of_channels_is_said_to_mean_the_turned_model(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    output = done(call("prune", "--recipe", recipe, *out, "--groups", "heads,hidden,qk,v"))
    assert f"{run.mask} means a model whose heads were turned (qk and v)" in output
    assert "turned" not in done(call("prune", *out, "--groups", "heads,hidden"))


def test_pruning_that_was_interrupted_is_done_again(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    done(call("prune", "--recipe", recipe, *out))
    run.made.record(run.pruned, {})
    refused(call("evaluate", *out), f"{run.pruned}: it was not finished")
    assert "% of the parameters" in done(call("train", *out))


def test_a_run_of_an_older_version_goes_on(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    done(call("train", "--recipe", recipe, "--admm-epochs", 1, *out))
    done(call("evaluate", *out))
    (run.directory / "made.json").unlink()
    stored = json.loads(run.scores.read_text())
    run.scores.write_text(json.dumps({**stored, "ranked": {"weights": "of a ranking that told less"}}))
    done(call("report", run.directory, "--rounds", 0))
    done(call("train", *out))
    (run.directory / "made.json").unlink()
    assert "model: top-1" in done(call("evaluate", *out))


def test_scores_of_another_ranking_do_not_guide_training(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    out = ("--out", run.directory)
    done(call("prune", "--recipe", recipe, *out))
    stored = json.loads(run.scores.read_text())
    run.scores.write_text(json.dumps({**stored, "ranked": {**stored["ranked"], "images": 3}}))
    refused(call("train", "--admm-epochs", 1, *out), f"{run.scores}: is of another ranking")
    assert f"{run.scores} is of another ranking: the heads are ranked anew" in done(call("prune", *out))


def test_damaged_records_are_refused(call: Call, recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    done(call("prune", "--recipe", recipe, "--out", run.directory))
    for text in ("[]", '{"format": 2, "files": {}}', '{"format": 1, "files": {"pruned": 3}}'):
        (run.directory / "made.json").write_text(text)
        refused(call("train", "--out", run.directory), f"{run.directory / 'made.json'}: ")


def test_damaged_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"format": 1, "ranked": {}, "scores": []}')
    with pytest.raises(ValueError, match="wanted format 2"):
        read_scores(path)
    path.write_text('{"format": 2, "ranked": {}, "scores": ["a"]}')
    with pytest.raises(ValueError, match="list of numbers a block"):
        read_scores(path)
