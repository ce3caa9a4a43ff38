# SPDX-License-Identifier: Apache-2.0
"""Breaks the Triton kernels one line at a time and looks whether a test notices.

    python -m tests.gohsp_kernels.triton.mutations [WORD ...]

Works on a copy of the tree. The tests are those with fixed inputs, which fail at once; random calls stay out, as they
would first look for the smallest failure. Prints a row of a Markdown table for each mutation, and exits with 1 where
one survived. Arguments choose mutations whose file or description contains one of them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.faults import ROOT, Run, planted, run_pytest

OPERATORS, BOUNDS = "test_operators.py", "triton/test_bounds.py"
FORWARD = (OPERATORS, "triton/test_forward.py", "triton/test_norm_algebra.py", BOUNDS)
BACKWARD = ("triton/test_backward.py", BOUNDS)


@dataclass(frozen=True)
class Mutation:
    """One change of one file, whose old text must be there exactly once."""

    what: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> tuple[str, ...]:
        return BACKWARD if "backward" in self.file else FORWARD


def _all() -> list[Mutation]:
    found: list[Mutation] = []

    def mutate(file: str, what: str, old: str, new: str) -> None:
        found.append(Mutation(what, file, old, new))

    linear = "linear.py"
    mutate(
        linear,
        "no row mask on x",
        "col[None, :], row_ok & k_ok[None, :], 0.0)\n        w_ok",
        "col[None, :], (row64 >= 0) & k_ok[None, :], 0.0)\n        w_ok",
    )
    mutate(
        linear, "no depth mask on the weight", "k_ok[:, None] & n_kept[None, :]", "(k >= 0)[:, None] & n_kept[None, :]"
    )
    mutate(linear, "no row mask on the store", "col, acc, ok)", "col, acc, (row64 >= 0) & n_ok[None, :])")
    mutate(linear, "no column mask on the store", "col, acc, ok)", "col, acc, row_ok & (col >= 0))")
    mutate(linear, "gather one column further", "tl.load(in_cols + k, k_ok, 0)", "tl.load(in_cols + k + 1, k_ok, 0)")
    mutate(linear, "no scatter", "(n if out_cols is None else tl.load(out_cols + n, n_ok, 0))[None, :]", "n[None, :]")
    mutate(
        linear,
        "untouched columns begin one early",
        "tiles_kept * BLOCK_N + n_out)",
        "tiles_kept * BLOCK_N + n_out - 1)",
    )
    mutate(linear, "no bias", "acc += tl.load(bias + n, n_kept, 0.0)[None, :]", "acc += 0.0")
    mutate(linear, "no eps", "from_pivot * from_pivot, 0.0) + eps)", "from_pivot * from_pivot, 0.0))")
    mutate(linear, "no mean", "acc - shift[:, None] * tl.load(row_sum", "acc - 0.0 * tl.load(row_sum")
    mutate(linear, "pivot counted twice", "shift = from_pivot if SHIFT else mean", "shift = mean")
    mutate(
        linear,
        "columns not read missing from the statistics",
        "range(n_in, features, BLOCK_K)",
        "range(features, features, BLOCK_K)",
    )
    mutate(linear, "no layer scale", "acc *= tl.load(scale + n, n_kept, 0.0)[None, :]", "acc *= 1.0")
    mutate(linear, "residual with the stride of the output", "row64 * residual_stride", "row64 * out_stride")
    mutate(linear, "output with the stride of the input", "out + row64 * out_stride", "out + row64 * x_stride")
    mutate(
        linear,
        "sums in float16",
        "acc = tl.dot(a, w, acc, input_precision=PRECISION)",
        "acc = tl.dot(a, w, acc, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
    )
    mutate(
        linear,
        "no row mask on what is loaded again",
        "load_again(x_row + col[None, :], row_ok & k_ok[None, :])",
        "load_again(x_row + col[None, :], (row64 >= 0) & k_ok[None, :])",
    )
    mutate(
        linear,
        "nothing loaded again",
        "values = load_again(x_row + col[None, :], row_ok & k_ok[None, :])",
        "values = a * 0.0",
    )
    attention = "attention.py"
    mutate(attention, "no rescale of the values", "v, acc * rescale[:, None],", "v, acc,")
    mutate(attention, "no rescale of the sum", "total = total * rescale + tl.sum(p, 1)", "total = total + tl.sum(p, 1)")
    mutate(attention, "old maximum", "p = tl.exp2(scores - new_high[:, None])", "p = tl.exp2(scores - high[:, None])")
    mutate(
        attention,
        "no mask on keys past the last",
        'scores = tl.where((key < tokens)[None, :], scores, float("-inf"))',
        "scores = scores + 0.0",
    )
    mutate(attention, "k read where q is", "key_ok, k_start, qk_width,", "key_ok, q_start, qk_width,")
    mutate(attention, "no mask on channels past the width", "row_ok & (c < width), 0.0)", "row_ok & (c >= 0), 0.0)")
    mutate(
        attention,
        "images one query apart too far",
        "(batch.to(tl.int64) * queries + row)[:, None] * out_stride",
        "(batch.to(tl.int64) * tokens + row)[:, None] * out_stride",
    )
    mutate(attention, "channels of the next head overwritten", "row_ok & (c < v_width))", "row_ok & (c < WIDTH))")
    mutate(attention, "no eps in the norm on q and k", "/ width + eps)", "/ width)")
    mutate(
        attention,
        "no bias in the norm on q and k",
        "normed += tl.load(bias + c, ok, 0.0).to(tl.float32)[None, :]",
        "normed += 0.0",
    )
    mutate(attention, "queries past the last", "row_ok = (row < queries)[:, None]", "row_ok = (row < tokens)[:, None]")
    mlp = "mlp.py"
    mutate(
        mlp,
        "padding in the variance",
        "tl.where((c < limit)[None, :], values - mean[:, None], 0.0)",
        "values - mean[:, None]",
    )
    mutate(
        mlp,
        "no mask on neurons past the last",
        "h_ok[:, None] & (a < n_out)[None, :]",
        "(h >= 0)[:, None] & (a < n_out)[None, :]",
    )
    mutate(mlp, "second panel reads the first's weights", "fc1_row + b[:, None],", "fc1_row + (b - PANEL_A)[:, None],")
    mutate(mlp, "no residual", "acc + tl.load(x_row + col, ok, 0.0).to(tl.float32), ok)", "acc, ok)")
    mutate(mlp, "gather order of the second panel", "in_cols, b, n_in, mean)", "None, b, n_in, mean)")
    packing = "../_packing.py"
    mutate(
        packing,
        "columns not kept come first",
        "torch.cat([cols, other.nonzero()[:, 0]])",
        "torch.cat([other.nonzero()[:, 0], cols])",
    )
    back = "linear_backward.py"
    mutate(
        back,
        "ranges of rows overlap",
        "tl.minimum(first + rows_per_range, rows)",
        "tl.minimum(first + rows_per_range + 1, rows)",
    )
    mutate(
        back,
        "all ranges into the first",
        "(part.to(tl.int64) * n_out + o)[:, None] * n_in",
        "(part * 0 + o)[:, None] * n_in",
    )
    mutate(back, "mean of the gradient kept", "g - common[:, None] - normed", "g - normed")
    mutate(back, "no slope of the activation", "g *= activation_slope(", "g += 0 * activation_slope(")
    mutate(
        back,
        "no scatter in the gradient",
        "(n if out_cols is None else tl.load(out_cols + n, n < n_out, 0))[None, :]",
        "n[None, :]",
    )
    mutate(back, "x not normalised for the weight", "a = ((a.to(tl.float32) - mean) * rstd)", "a = (a.to(tl.float32))")
    attention_back = "attention_backward.py"
    mutate(
        attention_back,
        "no delta for dQ",
        "v), input_precision=PRECISION) - delta[:, None])\n        dq",
        "v), input_precision=PRECISION))\n        dq",
    )
    mutate(attention_back, "no scale on dK", "dk * scale, key_ok", "dk, key_ok")
    mutate(attention_back, "no mask on keys", "tl.where((key < tokens)[None, :],", "tl.where((key >= 0)[None, :],")
    mutate(attention_back, "dV into the channels of K", "grad_row + v_start + c", "grad_row + k_start + c")
    return found


def killer(mutation: Mutation, folder: Path) -> str:
    """Name of the first test that fails with the mutation in the copy at ``folder``; empty where none does."""
    with planted(folder / "gohsp_kernels" / "triton" / mutation.file, mutation):
        run = pytest(folder, mutation.tests)
        died = run.status < 0
        if died:  # it wrote where it should not; the test of that stops it before
            run = pytest(folder, (BOUNDS,))
    assert run.status in (0, 1), run.text[-4000:]
    failed = re.findall(r"^FAILED tests/\S+::(\w+)", run.text, re.MULTILINE)
    return failed[0] if failed else "the interpreter dies of it" if died else ""


def pytest(folder: Path, files: tuple[str, ...]) -> Run:
    """Run the tests with fixed inputs in ``files`` up to the first that fails."""
    return run_pytest(folder, ["-k", "triton and not random_calls", *(f"tests/gohsp_kernels/{name}" for name in files)])


def main(words: list[str]) -> int:
    survivors = 0
    chosen = [m for m in _all() if not words or any(word in m.file or word in m.what for word in words)]
    print("| file | mutation | first test that fails |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "docs", ".hypothesis"))
        for mutation in chosen:
            name = killer(mutation, folder)
            survivors += not name
            print(f"| {mutation.file} | {mutation.what} | {name or '**none**'} |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
