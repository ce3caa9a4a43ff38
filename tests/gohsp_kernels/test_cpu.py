# SPDX-License-Identifier: Apache-2.0
"""What only the CPU kernels have: threads, embeddings, packed panels, the instruction sets of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gohsp_kernels as gk
from gohsp_kernels import cpu, testing
from gohsp_kernels.descriptors import Linear
from gohsp_kernels.formats import FORMATS
from gohsp_kernels.testing import Maker, error, poisoned

from . import cases

checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")

TOLERANCE = testing.TOLERANCE[torch.float32]
check = partial(cases.check, dtype=torch.float32, backend="cpu")


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small", "deit_base"])
def test_real_shapes(name: str) -> None:
    features, heads = {"deit_tiny": (192, 3), "deit_small": (384, 4), "deit_base": (768, 9)}[name]
    maker = Maker(8)
    check(maker.attention_sublayer(2, 197, features, [64] * heads, [64] * heads))
    check(maker.mlp_sublayer((2, 197), features, features * 5 // 2))


def test_more_tokens_than_a_score_row_of_one_panel() -> None:
    check(Maker(7).attention_sublayer(1, 1025, 32, [16], [16]))


@pytest.mark.parametrize(("down", "across", "own"), [(1, 1, 0), (3, 5, 1), (7, 4, 2)])
def test_embedding(down: int, across: int, own: int) -> None:
    """Patches that are not square, and tokens before them."""
    maker = Maker(14)
    images, weight, bias = maker.normal(3, 2, 3 * down, 5 * across), maker.normal(21, 2, 3, 5), maker.normal(21)
    base = maker.normal(own + down * across, 21)
    patches = torch.nn.functional.conv2d(images.double(), weight.double(), bias.double(), stride=(3, 5))
    truth = base.double().repeat(3, 1, 1)
    truth[:, own:] += patches.flatten(2).mT
    with poisoned():
        result = cpu.pack_embedding(weight, bias, base)(images)
    assert error(result, truth) < TOLERANCE


@pytest.mark.parametrize(("form", "tolerance"), [("bfloat16", 1e-5), ("int8", 2e-3)])
def test_embedding_with_rounded_weights(form: str, tolerance: float) -> None:
    maker = Maker(15)
    images, weight, bias = maker.normal(3, 2, 3 * 7, 5 * 4), maker.normal(21, 2, 3, 5), maker.normal(21)
    base = maker.normal(2 + 7 * 4, 21)
    patches = images.unfold(2, 3, 3).unfold(3, 5, 5).permute(0, 2, 3, 1, 4, 5).reshape(3, 28, 30)
    truth = base.double().repeat(3, 1, 1)
    linear = FORMATS[form].linear
    truth[:, 2:] += linear(patches.double(), weight.flatten(1), bias, levels=cpu.activation_levels())
    with poisoned():
        result = cpu.pack_embedding(weight, bias, base, form)(images)
    assert error(result, truth) < tolerance


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_and_threads(batch: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Maker(9).attention_sublayer(batch, 50, 64, [16, 5, 24], [16, 9, 3], 50, 33, num_queries=2))
        check(Maker(9).mlp_sublayer((batch, 50), 64, 100, 50, 33))
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_batch() -> None:
    call = Maker(12).attention_sublayer(4, 50, 64, [16, 5], [16, 9])
    together = call.run("cpu")
    for i in range(4):
        alone = call.with_x(call.x[i : i + 1]).run("cpu")
        assert error(alone, together[i : i + 1]) < TOLERANCE


WRONG_COLUMNS = {
    "descending": torch.tensor([3, 1]),
    "repeated": torch.tensor([1, 1]),
    "negative": torch.tensor([-1, 2]),
    "past the end": torch.tensor([1, 16]),
}


@pytest.mark.parametrize("columns", WRONG_COLUMNS)
def test_column_lists_are_checked(columns: str) -> None:
    x, weight = torch.randn(3, 16), torch.randn(4, 2)
    with pytest.raises(ValueError, match="in_cols: wanted ascending indices of the 16 features, without repeats"):
        gk.packed_linear(x, weight, in_cols=WRONG_COLUMNS[columns], backend="cpu")
    # The native operator trusts nobody either: an index past the end would be read from foreign memory.
    with pytest.raises(RuntimeError, match=r"columns: wanted ascending ones in \[0, 16\)"):
        torch.ops.gohsp_kernels.cpu_plan(WRONG_COLUMNS[columns], 16, False)


@pytest.mark.parametrize("scatter", [False, True])
def test_the_operators_refuse_plans_that_lead_elsewhere(scatter: bool) -> None:
    """Each number of a plan is changed; what is accepted still reads and writes within bounds."""
    features, columns = 40, torch.tensor([0, 3, 17, 38, 39])
    kept = {"in_cols": torch.arange(5), "out_cols": torch.arange(5)} | {"out_cols" if scatter else "in_cols": columns}
    packed = cpu._pack_linear(Linear(weight=torch.ones(5, 5), out_features=features, **kept), features)
    x, refused = torch.ones(3, features), 0
    for place in range(3, len(packed.layout)):
        layout = packed.layout.clone()
        layout[place] += 1 << 40
        try:
            result = torch.ops.gohsp_kernels.cpu_linear(x, packed.panels, layout, features)
        except RuntimeError as error:
            assert "layouts: " in str(error) or "x: wanted" in str(error)
            refused += 1
        else:
            assert result.shape == (3, features)
    assert refused >= 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [c for c in checks.capabilities() if c != cpu.capability()])
def test_other_instruction_sets(capability: str) -> None:
    """This file and the operators again, in a process that was told to use another instruction set."""
    here = Path(__file__)
    cases.run_again([here, here.with_name("test_operators.py")], capability)


@pytest.mark.slow
def test_unknown_instruction_set_is_refused() -> None:
    code = "import torch, gohsp_kernels as gk; gk.packed_linear(torch.ones(1, 2), torch.ones(1, 2), backend='cpu')"
    environment = {**os.environ, "GOHSP_CPU_CAPABILITY": "mmx"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "GOHSP_CPU_CAPABILITY" in run.stderr and "got 'mmx'" in run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4)}, "images: wanted 4 dimensions; got 3"),
        ({"images": torch.zeros(2, 3, 4, 10).double()}, "images: wanted float32"),
        ({"images": torch.zeros(2, 3, 4, 9)}, "images: wanted whole patches, at most 3"),
        ({"images": torch.zeros(2, 3, 8, 10)}, "images: wanted whole patches, at most 3"),
        ({"images": torch.zeros(2, 2, 4, 10)}, "panels: wanted the weights of 20 outputs and 40 inputs"),
        ({"patch": [4]}, "patch: wanted a height and a width"),
        ({"patch": [4, 0]}, "patch: wanted a height and a width"),
        ({"base": torch.zeros(20)}, "base: wanted 2 dimensions; got 1"),
        (
            {"layout": torch.tensor([5])},
            "panels: wanted weights that were packed for .* got some .* for another version of gohsp",
        ),
    ],
)
def test_embed_refuses(change: dict[str, Any], message: str) -> None:
    packed = cpu.pack_embedding(torch.zeros(20, 3, 4, 5), None, torch.zeros(3, 20))
    good = {"images": torch.zeros(2, 3, 4, 10), **vars(packed)}
    assert torch.ops.gohsp_kernels.cpu_embed(**good).shape == (2, 3, 20)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gohsp_kernels.cpu_embed(**(good | change))
