# SPDX-License-Identifier: Apache-2.0
"""Puts one fault at a time into the CUDA kernels and sees which test finds it.

    python -m tests.gohsp_kernels.cuda.mutations [NAME ...]       builds and tests each mutant; some 20 seconds for one

Needs the build tree that `make setup` leaves. test_mutations.py beside this file sees that each fault still fits the
source.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.faults import ROOT, Mutation, chosen, copy_tree, first_failure, plant, report

TREE = ROOT / "build" / "native"
SOURCES = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests" / "gohsp_kernels"

LINEAR, ATTENTION, ROWS = "linear.cuh", "attention.cuh", "rows.cuh"
MUTATIONS = {
    "linear: no barrier in the main loop": Mutation(
        LINEAR, "    barrier();  // this step has", "    // this step has",
        "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: no barrier before the way out": Mutation(
        LINEAR, "  wait_copies<0>();\n  barrier();\n", "  wait_copies<0>();\n",
        "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: waits for one copy too few": Mutation(
        LINEAR, "wait_copies<Tile::STAGES - 2>", "wait_copies<Tile::STAGES - 1>",
        "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: fills the stage that is being read": Mutation(
        LINEAR, "loader.bring_rows(next, next % Tile::STAGES)", "loader.bring_rows(next, stage)",
        "cuda/test_numerics.py::test_every_form_of_input",
    ),
    "linear: no barrier of the warp after its results": Mutation(
        LINEAR, "      warp_barrier();\n      leave(", "      leave(", "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: no barrier of the warp before the next results": Mutation(
        LINEAR, "last_n, lane});\n      warp_barrier();\n", "last_n, lane});\n",
        "cuda/test_numerics.py::test_more_than_one_tile"
    ),
    "linear: no barrier before parts of the depth are added up": Mutation(
        LINEAR, "    barrier();\n    leave(", "    leave(", "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: the first part of the depth alone": Mutation(
        LINEAR, "for (int part = 1; part < Tile::WARPS_K; ++part)", "for (int part = 1; part < 1; ++part)",
        "cuda/test_numerics.py::test_every_form_of_input",
    ),
    "linear: rows brought before the launch before has ended": Mutation(
        LINEAR, "  wait_for_launch_before();\n", "", "cuda/test_numerics.py::test_random_chains"
    ),
    "linear: products read what was not fenced": Mutation(
        LINEAR, "if constexpr (Tile::WARPGROUPS) fence_for_products();", "",
        "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: no wait for products": Mutation(
        LINEAR, "      wait_products<Tile::BN>(&acc[0][0][0]);", "      ;",
        "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: depth of a product not advanced": Mutation(
        LINEAR, "base + Tile::BM * 128 + 32 * half", "base + Tile::BM * 128",
        "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: statistics of half of a row": Mutation(
        ROWS, "merge_lanes(static_cast<float>(parts * kPartial), mean, squares, 1);", "",
        "cuda/test_numerics.py::test_statistics_that_the_writer_of_the_rows_leaves",
    ),
    "linear: columns' means do not spread": Mutation(
        ROWS, "  squares += kPartial * (spread - sum * from_pivot);\n", "",
        "cuda/test_numerics.py::test_statistics_that_the_writer_of_the_rows_leaves",
    ),
    "linear: fragments of the weight shifted": Mutation(
        LINEAR, "2 * half + lane / 8 % 2", "2 * half + lane / 16", "cuda/test_numerics.py::test_every_form_of_input"
    ),
    "linear: halves of the rows' fragment changed over": Mutation(
        LINEAR, "Tile::row(warp, i) + lane % 16, 2 * half + lane / 16",
        "Tile::row(warp, i) + lane / 2, 2 * half + lane % 2",
        "cuda/test_numerics.py::test_every_form_of_input",
    ),
    "linear: chunks lie in the order of their rows": Mutation(
        LINEAR, "((chunk ^ turn) << 4)", "(chunk << 4)",
        "cuda/test_numerics.py::test_fragments_are_read_without_bank_conflicts",
    ),
    "linear: rows past the end are read": Mutation(
        LINEAR, "a_ok[i] = r < p.rows;", "a_ok[i] = true;", "test_operators.py::test_edges"
    ),
    "linear: weights past the end are read": Mutation(
        LINEAR, "b_ok[i] = n < p.n;", "b_ok[i] = true;", "test_operators.py::test_edges"
    ),
    "linear: depth past the end is read": Mutation(
        LINEAR, "a[i] + source), inside && a_ok[i])", "a[i] + place), a_ok[i])", "test_operators.py::test_edges"
    ),
    "linear: rows past the end are written": Mutation(
        LINEAR, "const bool there = inside && row < p.rows;", "const bool there = inside;",
        "test_operators.py::test_edges"
    ),
    "linear: the mean is not taken off": Mutation(
        LINEAR, "const float shift = -statistics.x * statistics.y;", "const float shift = 0.0f;",
        "cuda/test_numerics.py::test_statistics_of_the_rows",
    ),
    "linear: residual rows of other tokens": Mutation(
        LINEAR, "row / p.queries * p.tokens + row % p.queries", "row", "test_operators.py::test_edges"
    ),
    "attention: no barrier before the scores": Mutation(
        ATTENTION, "    wait_copies<0>();\n    barrier();\n", "    wait_copies<0>();\n",
        "test_operators.py::test_the_tokens_of_an_image"
    ),
    "attention: no wait for keys and values": Mutation(
        ATTENTION, "    wait_copies<0>();\n    barrier();\n", "    barrier();\n",
        "test_operators.py::test_the_tokens_of_an_image"
    ),
    "attention: no barrier before keys and values are replaced": Mutation(
        ATTENTION, "if (token > 0) barrier();", "", "cuda/test_numerics.py::test_more_keys_than_fit"
    ),
    "attention: no barrier before warps hand over": Mutation(
        ATTENTION, "    barrier();  // all are done with the keys and values\n", "",
        "test_operators.py::test_the_tokens_of_an_image"
    ),
    "attention: no barrier before warps merge": Mutation(
        ATTENTION, "merging_place<Tile>(p, tile, part));\n    barrier();\n", "merging_place<Tile>(p, tile, part));\n",
        "test_operators.py::test_the_tokens_of_an_image",
    ),
    "attention: totals are merged without their factors": Mutation(
        ATTENTION, "s.total[r] += factor[r] * load_shared", "s.total[r] += load_shared",
        "test_operators.py::test_the_tokens_of_an_image"
    ),
    "attention: rows read before the launch before has ended": Mutation(
        ATTENTION, "  wait_for_launch_before();\n", "", "cuda/test_numerics.py::test_random_chains"
    ),
    "attention: no barrier after the norms of q and k": Mutation(
        ATTENTION, "p.eps, threads);\n      barrier();\n", "p.eps, threads);\n",
        "test_operators.py::test_random_calls"
    ),
    "attention: keys past the end count": Mutation(
        ATTENTION, "there ? scores[j][i] * scale_log2 : minus_infinity()", "scores[j][i] * scale_log2",
        "test_operators.py::test_edges",
    ),
    "attention: rows past the last key are not zeroed": Mutation(
        ATTENTION, "row + v_start, p.qkv_stride, count, 16 * groups", "row + v_start, p.qkv_stride, count, count",
        "test_operators.py::test_edges",
    ),
    "attention: channels past the last are not zeroed": Mutation(
        ATTENTION, "chunk >= 2 * fragments(width, 2 * Tile::PER_CHUNK)", "chunk * Tile::PER_CHUNK >= width",
        "test_operators.py::test_edges",
    ),
    "attention: channels of the next head are read": Mutation(
        ATTENTION, "row < count && i < inside ?", "row < count ?",
        "cuda/test_numerics.py::test_tensor_cores_do_not_mix_the_heads_padding_in",
    ),
    "attention: channels past the last are written": Mutation(
        ATTENTION, "if (channel + 1 < v_width) store", "if (channel < v_width) store",
        "test_operators.py::test_edges"
    ),
    "attention: both rows of a lane rescaled alike": Mutation(
        ATTENTION, "acc[j][2] *= rescale.y", "acc[j][2] *= rescale.x",
        "test_operators.py::test_the_tokens_of_an_image"
    ),
    "attention: chunks lie in the order of their rows": Mutation(
        ATTENTION, "((chunk ^ (row & 7)) << 4)", "(chunk << 4)",
        "cuda/test_numerics.py::test_fragments_are_read_without_bank_conflicts"
    ),
    "attention: fragments of the weights changed over": Mutation(
        ATTENTION, "pack2<T>(p[0][2], p[0][3]), pack2<T>(p[1][0], p[1][1])",
        "pack2<T>(p[1][0], p[1][1]), pack2<T>(p[0][2], p[0][3])", "test_operators.py::test_edges",
    ),
    "attention: values of float32 in another order": Mutation(
        ATTENTION, "attention_channel<Tile>(row + 1, channel)", "attention_channel<Tile>(row + 4, channel)",
        "test_operators.py::test_edges",
    ),
    "rows: columns past the last are copied": Mutation(ROWS, "if (c < p.count) {", "{",
    "cuda/test_numerics.py::test_every_form_of_input"),
}  # fmt: skip


def build(mutation: Mutation, folder: Path, module: Path) -> None:
    """Compile the mutated kernels and link them with the rest of the module as it was built."""
    copy_tree(folder, "csrc")
    plant(folder / "csrc" / "cuda" / mutation.file, mutation)
    commands = json.loads((TREE / "compile_commands.json").read_text())
    (command,) = (c["command"] for c in commands if c["file"].endswith("emulate/emulated.cpp"))
    words = shlex.split(command)
    compiled = Path(words[words.index("-o") + 1])
    words[words.index("-o") + 1] = str(folder / "mutant.o")
    words[words.index("-c") + 1] = str(folder / "csrc/cuda/emulate/emulated.cpp")
    subprocess.run(words, cwd=TREE, check=True, capture_output=True)
    outputs = [words_of[words_of.index("-o") + 1] for words_of in (shlex.split(c["command"]) for c in commands)]
    parts = tuple(
        f"CMakeFiles/{name}.dir/" for name in ("_checks_cuda", "gohsp_operators_emulated", "gohsp_kernels_emulated")
    )
    others = [str(TREE / o) for o in outputs if o.startswith(parts) and not o.endswith(compiled.name)]
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    link = ["g++", "-shared", "-o", str(module), str(folder / "mutant.o"), *others, str(torch_library)]
    subprocess.run(link, check=True, capture_output=True)


def find(mutation: Mutation) -> str:
    """Build a mutant and return the test that finds it, or the empty string."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder, "tests", "python", "bench", "pyproject.toml")
        copy_tree(folder, "gohsp_kernels", leave=("_C_cuda*",))
        (module,) = (folder / "gohsp_kernels").glob("_checks_cuda*.so")
        module.unlink()
        build(mutation, folder, module)
        return first_failure(folder, [f"tests/gohsp_kernels/{mutation.test}", "-k", "cuda", "--hypothesis-seed=0"])


def main(names: list[str]) -> int:
    return report(chosen(names, MUTATIONS), find)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
