# SPDX-License-Identifier: Apache-2.0
"""Public functions name the argument that is wrong, in one line, and leave the model that they were given as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gohsp
from gohsp.pruning.axes import principal_axes
from gohsp.serialization import digest_weights

from .scale import TIMES
from .test_state import FIT, IMAGES, Data, mask_of, small, vit

VALUES = (
    *[None, True, "x", b"x", 1.5, -1, 0, 2**70, float("nan"), float("inf"), -float("inf"), 1j],
    *[[], {}, [None], ["x"], {"params": "x"}, {"heads": float("nan")}, object(), nn.Linear(2, 2), torch.ones(2)],
)
"""Of every kind; some are right for some arguments."""

NAMES = {"data": ("data", "mask", "fit.batch_size"), "start": ("start", "model"), "test": ("test", "data")}
"""What an error may call an argument where that is not its own name."""


def is_ours(argument: str, value: Any) -> bool:
    """Whether it is for gohsp to find fault: not with what a data set or a function does that a user gives."""
    if argument in ("data", "test"):
        return not isinstance(value, list | torch.Tensor)
    return not (argument.startswith("on_") and isinstance(value, nn.Module))


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions with good arguments, of which one at a time is exchanged."""
    dense, compressed, target = vit(), small(), {"params": 0.7}
    pruned = gohsp.prune(dense, [IMAGES], target)
    return {
        "prune": (
            gohsp.prune,
            {"model": dense, "batches": [IMAGES], "target": target, "method": "gohsp", "groups": ["heads", "hidden"]}
            | {"optimiser": "ridge", "refine": 0, "budgets": None, "floors": {}, "latency": None, "importance": None}
            | {"similarity": "cka", "teleport": 0.0, "high_is": "important", "guidance": 1.0, "ridge": 0.3}
            | {"max_images": None, "seed": 0, "on_progress": None, "axes": "principal", "ignore": []},
        ),
        "principal_axes": (
            principal_axes,
            {"model": dense, "batches": [IMAGES], "groups": ["qk", "v"], "seed": 0},
        ),
        "rank_heads": (
            gohsp.rank_heads,
            {"model": dense, "batches": [IMAGES], "similarity": "cka", "teleport": 0.0, "high_is": "auto"}
            | {"max_images": None},
        ),
        "synthesise": (
            gohsp.synthesise,
            {"model": dense, "n": 2, "kind": "optimised", "steps": 1, "seed": 0, "on_progress": None},
        ),
        "compress": (gohsp.compress, {"model": dense, "mask": mask_of(dense)}),
        "densify": (gohsp.densify, {"model": compressed}),
        "expand": (gohsp.expand, {"model": compressed}),
        "freeze": (gohsp.freeze, {"model": compressed, "weights": "float32"}),
        "KeyframeModel": (gohsp.KeyframeModel, {"dense": dense, "pruned": compressed, "every": 2}),
        "count": (gohsp.count, {"model": dense}),
        "save": (gohsp.save, {"model": compressed, "directory": "saved"}),
        "load": (gohsp.load, {"directory": "saved"}),
        "ModelMask.full": (gohsp.ModelMask.full, {"model": dense}),
        "ModelMask.of": (gohsp.ModelMask.of, {"model": compressed}),
        "ModelMask.keep_first": (gohsp.ModelMask.keep_first, {"model": dense, "heads": 1, "hidden": 5}),
        "ModelMask.random": (gohsp.ModelMask.random, {"model": dense, "keep": 0.5, "generator": None}),
        "ModelMask.from_dict": (gohsp.ModelMask.from_dict, {"data": mask_of(dense).to_dict()}),
        "ModelMask.save": (mask_of(dense).save, {"path": "mask.json"}),
        "ModelMask.load": (gohsp.ModelMask.load, {"path": "mask.json"}),
        "LatencyTable.measure": (gohsp.LatencyTable.measure, {"model": vit(1, 0.7), "batch": 1, "rounds": 1}),
        "train": (
            gohsp.train,
            {"start": pruned, "data": Data(), "fit": FIT, "admm": None, "plan": None, "importance": None}
            | {"distill": None, "teacher": None, "test": None, "directory": None, "checkpoint_steps": None}
            | {"workers": 0, "seed": 0, "on_step": None},
        ),
    }


def looks(model: Any) -> Any:
    """What tells a changed model from one that was left alone."""
    if not isinstance(model, nn.Module):
        return None
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, type(m)) for m in model.modules()]
    return digest_weights(model), hooks, [(p.requires_grad, p.grad is None) for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", calls())
def test_wrong_arguments_are_named(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, good = calls()[name]
    rng = random.Random(name)
    counts, faults = {"tried": 0, "refused": 0}, []
    for argument in good:
        for value in VALUES if TIMES > 1 else rng.sample(VALUES, 5):
            if not is_ours(argument, value):
                continue
            before = {key: looks(given) for key, given in good.items()}
            counts["tried"] += 1
            try:
                function(**{**good, argument: value})
            except FileNotFoundError as error:
                if argument not in ("directory", "path"):
                    faults.append(f"{argument}={value!r}: {error}")
            except (TypeError, ValueError) as error:
                counts["refused"] += 1
                named = any(name in str(error) for name in NAMES.get(argument, (argument,)))
                if not named or len(str(error).splitlines()) != 1:
                    faults.append(f"{argument}={value!r}: {type(error).__name__}: {error}")
            except Exception as error:
                faults.append(f"{argument}={value!r}: {type(error).__name__}: {error}")
            if {key: looks(given) for key, given in good.items()} != before:
                faults.append(f"{argument}={value!r}: a model was changed")
    print(name, counts)
    assert not faults, "\n".join(faults)
