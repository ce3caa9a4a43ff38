# SPDX-License-Identifier: Apache-2.0
"""gohsp.train: every way into it, what it leaves behind, and that a run can be killed, resumed and shared."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gohsp
from gohsp.files import alone
from gohsp.training import checkpoint
from gohsp.training.loop import CHECKPOINT, METRICS, Loop, by_products
from gohsp.training.losses import stream_distance, watch

from . import digits_run as runs

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script(*arguments: str | Path) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def compact(**options: Any) -> Any:
    model = runs.make_vit(**options)
    return gohsp.compress(model, runs.make_plan(model))


def test_all_stages_give_a_compact_model_that_learnt(tmp_path: Path) -> None:
    result = runs.run(tmp_path)
    plan = runs.make_plan(runs.make_vit())
    for block, wanted in zip(result.mask.blocks, plan.blocks, strict=True):
        assert (block.heads.sum(), block.hidden.sum()) == (wanted.heads.sum(), wanted.hidden.sum())
    assert gohsp.ModelMask.of(result.model).blocks == result.mask.blocks
    assert not result.model.training
    assert [row["stage"] for row in result.history] == ["admm"] * 3 + ["finetune"] * 2
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.history[2]["softness"] == 0.0 and result.history[2]["residual"] < result.history[0]["residual"]
    with (tmp_path / METRICS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in result.history]
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, METRICS}


def test_what_was_pruned_without_training_is_fine_tuned() -> None:
    model = runs.make_vit().eval()
    data = runs.Digits()
    pruned = gohsp.prune(model, [data.images[:16]], target={"params": 0.7})
    before = {name: tensor.clone() for name, tensor in pruned.model.state_dict().items()}
    result = gohsp.train(pruned, data, fit=runs.FIT)
    assert result.mask == pruned.mask and gohsp.ModelMask.of(result.model).blocks == pruned.mask.blocks
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert same(before, pruned.model.state_dict())


def test_a_compressed_model_is_copied_and_trained() -> None:
    small = compact()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    result = gohsp.train(small, runs.Digits(), fit=runs.FIT)
    assert same(before, small.state_dict())
    assert not same(before, result.model.state_dict())


def test_a_dense_model_is_trained_as_it_is_to_compare_with() -> None:
    result = gohsp.train(runs.make_vit(), runs.Digits(), fit=runs.FIT)
    assert result.mask == gohsp.ModelMask.full(runs.make_vit())
    assert type(result.model) is type(runs.make_vit())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_pulls_the_student_to_its_answers(kind: Any) -> None:
    teacher, data = runs.make_vit(), runs.Digits()
    with torch.no_grad():
        teacher.head.bias[3] = 50.0  # it calls everything a three
    distill = gohsp.Distillation(kind=kind, weight=1.0)
    fit = runs.FIT.model_copy(update={"epochs": 6, "lr": 1e-2})
    result = gohsp.train(compact(), data, fit=fit, distill=distill, teacher=teacher)
    with torch.inference_mode():
        assert (result.model(data.images).argmax(dim=1) == 3).all()
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_features_pull_the_student_to_the_teachers_stream_and_leave_no_hook() -> None:
    teacher, data = runs.make_vit().eval(), runs.Digits()

    def far(model: torch.nn.Module) -> float:
        with torch.inference_mode(), watch(model) as own, watch(teacher) as wanted:
            model(data.images), teacher(data.images)
        return float(stream_distance(own, wanted))

    start = compact().eval()
    fit = runs.FIT.model_copy(update={"epochs": 6})
    alone, held = (
        gohsp.train(start, data, fit=fit, distill=distill, teacher=teacher).model
        for distill in (gohsp.Distillation(weight=0.0), gohsp.Distillation(weight=0.0, features=10.0))
    )
    assert not any(module._forward_hooks for model in (held, teacher) for module in model.modules())
    assert far(held) < 0.8 * far(start) and far(held) < 0.5 * far(alone)


def test_the_checkpoint_of_another_teacher_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fit": runs.FIT, "distill": gohsp.Distillation(), "directory": tmp_path}
    gohsp.train(compact(), runs.Digits(), teacher=runs.make_vit(), **options)
    other = runs.make_vit()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(ValueError, match="another teacher"):
        gohsp.train(compact(), runs.Digits(), teacher=other, **options)


def test_bf16_autocast_trains_the_compact_model() -> None:
    fit = runs.FIT.model_copy(update={"precision": "bf16"})
    result = gohsp.train(compact(), runs.Digits(), fit=fit)
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


def test_a_dense_model_trains_in_bf16_by_products_and_is_left_as_it_was() -> None:
    model = runs.make_vit()
    model.blocks[1].attn.scale *= 2  # which the fused form does not look at
    with pytest.raises(RuntimeError, match="inside"), by_products(model, on=True):
        assert [block.attn.fused_attn for block in model.blocks] == [False, True]
        raise RuntimeError("inside")
    with by_products(model, on=False):
        assert all(block.attn.fused_attn for block in model.blocks)
    fit = runs.FIT.model_copy(update={"precision": "bf16"})
    result = gohsp.train(runs.make_vit(), runs.Digits(), fit=fit)
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert all(block.attn.fused_attn for block in result.model.blocks)


@pytest.mark.slow
def test_workers_do_not_change_the_result() -> None:
    data = runs.Digits(noisy=True)
    first, second = (gohsp.train(compact(), data, fit=runs.FIT, workers=workers) for workers in (0, 2))
    assert same(first.model.state_dict(), second.model.state_dict())


def test_the_seed_changes_the_result_and_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first, second = (gohsp.train(compact(), runs.Digits(noisy=True), fit=runs.FIT, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.rand(3), wanted)
    assert not same(first.model.state_dict(), second.model.state_dict())


def test_steps_are_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, float]] = []
    gohsp.train(compact(), runs.Digits(), fit=runs.FIT, on_step=lambda *told: seen.append(told))
    assert [told[:3] for told in seen] == [("finetune", step, 6) for step in range(1, 7)]


def test_a_finished_run_is_read_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.run(tmp_path)
    monkeypatch.setattr(Loop, "_batches", lambda *_: pytest.fail("it trained again"))
    second = runs.run(tmp_path)
    assert same(first.model.state_dict(), second.model.state_dict())
    assert first.history == second.history and first.mask == second.mask


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 1}, "seed"), ({"fit": runs.FIT.model_copy(update={"lr": 1.0})}, "fit")]
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    gohsp.train(compact(), runs.Digits(), fit=runs.FIT, directory=tmp_path)
    with pytest.raises(ValueError, match=f"another {named}"):
        gohsp.train(compact(), runs.Digits(), **{"fit": runs.FIT, "directory": tmp_path, **change})


def test_the_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    small = compact()
    gohsp.train(small, runs.Digits(), fit=runs.FIT, directory=tmp_path)
    with torch.no_grad():
        small.head.bias += 1
    with pytest.raises(ValueError, match="another start"):
        gohsp.train(small, runs.Digits(), fit=runs.FIT, directory=tmp_path)


def narrowed() -> torch.nn.Module:
    """A model of half the width that says that it has the whole one, as other tools leave it."""
    model = runs.make_vit(embed_dim=16)
    model.embed_dim = 32
    return model


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (compact, {"admm": runs.ADMM}, "admm: wanted none"),
        (runs.make_vit, {"admm": runs.ADMM}, "wanted both"),
        (compact, {"distill": gohsp.Distillation()}, "teacher: wanted one"),
        (compact, {"teacher": runs.make_vit()}, "teacher: wanted none"),
        (
            compact,
            {"distill": gohsp.Distillation(features=1.0), "teacher": runs.make_vit(depth=3)},
            "stream of 2 blocks x 5 tokens x 32 features like the student's.* it has 3 blocks",
        ),
        (
            compact,
            {"distill": gohsp.Distillation(features=1.0), "teacher": narrowed()},
            "32 features like the student's.* it has 2 blocks x 5 tokens x 16 features",
        ),
        (compact, {"distill": gohsp.Distillation(features=1.0), "teacher": torch.nn.Flatten()}, "no vision trans"),
        (compact, {"fit": runs.FIT.model_copy(update={"batch_size": 64})}, "at most the 48 images"),
        (
            runs.make_vit,
            {"admm": runs.ADMM, "plan": gohsp.ModelMask.full(runs.make_vit())},
            "importance: wanted scores",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(start: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gohsp.train(start(), runs.Digits(), **{"fit": runs.FIT, **options})


def test_a_start_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="start: wanted"):
        gohsp.train("deit", runs.Digits())  # type: ignore[arg-type]


def test_without_accelerate_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install accelerate"):
        gohsp.train(compact(), runs.Digits())


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at random moments and at each point of writing a checkpoint, with dropout, mixup and augmentation."""
    told = json.loads(script(HERE / "interrupt.py", tmp_path))
    assert told["killed"] >= 1  # the first at least, which starts anew and dies before its end
    whole = runs.final_weights(tmp_path / "whole")
    others = [folder for folder in tmp_path.iterdir() if folder.name != "whole"]
    assert len(others) == 4
    for folder in others:
        assert same(whole, runs.final_weights(folder)), folder.name
    metrics = [(folder / METRICS).read_text().splitlines() for folder in tmp_path.iterdir()]
    # All but the seconds, which come last.
    assert len({"\n".join(line.rpartition(",")[0] for line in lines) for lines in metrics}) == 1


@pytest.mark.slow
def test_two_processes_over_gloo_end_where_one_does(tmp_path: Path) -> None:
    """The same batches, shared by two processes that torch's launcher starts, in float64 to make a difference show."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    told = script(*launch, HERE / "digits_run.py", tmp_path)
    assert all(f"process {process} of 2 over gloo" in told for process in range(2))
    alone = runs.run(None, dtype=torch.float64, distill=runs.DISTILL)
    together = runs.final_weights(tmp_path)
    assert together.keys() == alone.model.state_dict().keys()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-9, atol=1e-12)
    saved = checkpoint.read(tmp_path / CHECKPOINT)
    for ours, theirs in zip(alone.history, saved.values["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["top1"] == theirs["top1"]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        gohsp.train(compact(), runs.Digits(), fit=runs.FIT)


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    small, refused = compact(), []

    def meanwhile(stage: str, step: int, total: int, loss: float) -> None:
        with pytest.raises(ValueError, match=f"^{tmp_path}: another process or thread works there"):
            elsewhere.submit(gohsp.train, small, runs.Digits(), fit=runs.FIT, directory=tmp_path).result()
        gohsp.save(small, tmp_path)  # by the thread that trains there, which does not wait for itself
        refused.append(step)

    with ThreadPoolExecutor() as elsewhere:
        first = gohsp.train(small, runs.Digits(), fit=runs.FIT, directory=tmp_path, on_step=meanwhile)
        assert refused == [1, 2, 3, 4, 5, 6]
        again = elsewhere.submit(gohsp.train, small, runs.Digits(), fit=runs.FIT, directory=tmp_path).result()
        assert same(first.model.state_dict(), again.model.state_dict())
    with alone(tmp_path):  # as the command line does
        again = gohsp.train(small, runs.Digits(), fit=runs.FIT, directory=tmp_path)
    assert same(first.model.state_dict(), again.model.state_dict())
