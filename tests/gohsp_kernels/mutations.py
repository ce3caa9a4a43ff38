# SPDX-License-Identifier: Apache-2.0
"""Puts one fault at a time into the CPU kernels and sees that a test finds it.

    python -m tests.gohsp_kernels.mutations [NAME ...]       builds and tests each mutant; some 20 seconds for one

Works on a copy of the sources, where the scalar kernels alone are compiled: all instruction sets share one text, and
this one runs on every machine. test_mutations.py sees that each fault still fits the source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults import ROOT, Mutation, chosen, copy_tree, first_failure, planted, report

SOURCES = ROOT / "csrc"
TESTS = Path(__file__).parent

ROWS, ATTENTION, CHAIN = "cpu/rows.h", "cpu/attention.h", "cpu/sublayers.h"
FORMAT, FLOAT32, INT8, BF16 = (f"cpu/formats/{name}.h" for name in ("format", "float32", "int8", "bfloat16"))
CHECKSUM, PRIMITIVES = "cpu/checksum.h", "cpu/primitives.h"
OPERATORS = "torch/cpu_ops.cpp"

MUTATIONS = {
    "product: no bias in a panel that is not full": Mutation(
        FLOAT32, "(from.bias != nullptr && j < used)", "(from.bias != nullptr && used == width)",
        "test_cpu.py::test_batches_and_threads",
    ),
    "product: the last of an odd number of inputs is left out": Mutation(
        FORMAT, "for (int64_t k = 0; k < depth; ++k, b += ldb)",
        "for (int64_t k = 0; k < depth / 2 * 2; ++k, b += ldb)",
        "test_cpu.py::test_batches_and_threads",
    ),
    "product: tiles after the first begin one row early": Mutation(
        FLOAT32, "tile(a.values + r0 * a.ld, a.ld", "tile(a.values + (r0 > 0 ? r0 - 1 : 0) * a.ld, a.ld",
        "test_cpu.py::test_batches_and_threads",
    ),
    "product: the last panel gives columns past the end": Mutation(
        "cpu/product.h", "min(N, w.n - p * N), c);", "vectors * W, c);", "test_operators.py::test_edges"
    ),
    "norm: the columns after the last whole vector are not in the mean": Mutation(
        ROWS, "Vec sum = load_first(x + whole, rest);", "Vec sum = {};", "test_operators.py::test_edges"
    ),
    "norm: the columns after the last whole vector are not in the variance": Mutation(
        ROWS,
        "  for (int64_t j = 0; j < rest; ++j) squares[j] = (x[whole + j] - mean) * (x[whole + j] - mean);\n", "",
        "test_operators.py::test_edges",
    ),
    "norm: the variance is that of whole vectors' width": Mutation(
        ROWS, "(sum_lanes(squares) + zeros) / static_cast<float>(features)",
        "(sum_lanes(squares) + zeros) / static_cast<float>(whole)",
        "test_operators.py::test_edges",
    ),
    "norm: no eps": Mutation(
        ROWS, "static_cast<float>(features) + eps)", "static_cast<float>(features))", "test_operators.py::test_edges"
    ),
    "norm: statistics of as many columns as are kept": Mutation(
        CHAIN, "normalise_row(part.norm, x + i * shape_.features, shape_.features, shape_.features, part.eps,",
        "normalise_row(part.norm, x + i * shape_.features, w.k, w.k, part.eps,",
        "test_cpu.py::test_batches_and_threads",
    ),
    "norm: RMSNorm takes the mean": Mutation(
        ROWS, "if (norm == Norm::layer) {", "if (true) {", "test_operators.py::test_edges"
    ),
    "inner norm: pruned zeros are not in the variance": Mutation(
        ROWS, "static_cast<float>(features - count) * mean * mean", "0.0f", "test_operators.py::test_edges"
    ),
    "inner norm: over what is kept": Mutation(
        CHAIN, "normalise_row(norm, row, w.k, of.features, of.eps, row);",
        "normalise_row(norm, row, w.k, w.k, of.eps, row);", "test_operators.py::test_edges",
    ),
    "gate: the activation is on what is gated": Mutation(
        CHAIN, "store_product(left, rows, gated ? m.gate : m.fc1, m.activation, scratch.inner, ld_inner_);\n"
        "      if (gated) multiply_by_product(left, rows, m.fc1, scratch.inner, ld_inner_);",
        "store_product(left, rows, m.fc1, m.activation, scratch.inner, ld_inner_);\n"
        "      if (gated) multiply_by_product(left, rows, m.gate, scratch.inner, ld_inner_);",
        "test_operators.py::test_edges",
    ),
    "rotary positions: turned the other way": Mutation(
        ATTENTION, "store(a + c, x * u - y * v);", "store(a + c, x * u + y * v);", "test_operators.py::test_edges"
    ),
    "rotary positions: keys of a later block take the angles of the first": Mutation(
        ATTENTION, "turn_heads(heads, r0 + i, k);", "turn_heads(heads, i, k);", "test_operators.py::test_edges"
    ),
    "rotary positions: every head takes the angles of the first": Mutation(
        ATTENTION, "pair += half;", "", "test_operators.py::test_edges"
    ),
    "biased scores: every image takes the first group": Mutation(
        ATTENTION, "(image % bias.groups * heads + head)", "head", "test_operators.py::test_edges"
    ),
    "biased scores: every head takes those of the first": Mutation(
        ATTENTION, "(image % bias.groups * heads + head)", "(image % bias.groups * heads)",
        "test_operators.py::test_edges",
    ),
    "biased scores: queries of a later tile take those of the first": Mutation(
        ATTENTION, "bias.row(r0 + i)", "bias.row(i)", "test_operators.py::test_edges"
    ),
    "cosines: the factor of the first head is that of all": Mutation(
        ATTENTION, "1.0f : factors[h]", "1.0f : factors[0]", "test_operators.py::test_edges"
    ),
    "cosines: keys keep their length": Mutation(
        ATTENTION, "if (heads.cosine != nullptr) give_length(heads, nullptr, k);", "", "test_operators.py::test_edges"
    ),
    "a norm behind: it is in front as well": Mutation(
        CHAIN, "if (part.behind == nullptr) {", "if (true) {", "test_operators.py::test_edges"
    ),
    "a norm behind: rows keep what they are": Mutation(
        CHAIN, "normalise_row(part.norm, row, features, features, part.eps, row);", "",
        "test_operators.py::test_edges",
    ),
    "gather: the first column of the next vector is taken": Mutation(
        ROWS, "kept[next] < first + W)", "kept[next] <= first + W)",
        "test_cpu.py::test_batches_and_threads",
    ),
    "scatter: lanes are masked as if the kept columns came first": Mutation(
        ROWS, "plan->mask[lane] = -1;", "plan->mask[place] = -1;", "test_cpu.py::test_batches_and_threads"
    ),
    "scatter: the columns after the last whole vector are not written": Mutation(
        ROWS,
        "  if (rest > 0) store_first(y + whole, load_first(x + whole, rest) + expand_vector(packed, *plan), rest);\n",
        "", "test_operators.py::test_edges",
    ),
    "scatter: a linear layer does not write the columns after the last whole vector": Mutation(
        PRIMITIVES, "  if (whole < features) store_first(y + whole, expand_vector(packed, *plan), features - whole);\n",
        "", "test_operators.py::test_edges",
    ),
    "residual: added twice in the columns after the last whole vector": Mutation(
        ROWS, "load_first(x + whole, rest) + load(c + whole), rest)",
        "2 * load_first(x + whole, rest) + load(c + whole), rest)", "test_operators.py::test_edges",
    ),
    "residual: the second MLP of a segment reads what the first read": Mutation(
        CHAIN, "for (; layer < end; ++layer, from = to) mlp_rows", "for (; layer < end; ++layer) mlp_rows",
        "test_chain.py::test_chain_that_begins_and_ends_with_two_mlps",
    ),
    "activation: GELU in the place of its approximation by tanh": Mutation(
        ROWS, "return map<gelu_tanh>(x", "return map<gelu>(x", "test_native.py::test_activations"
    ),
    "activation: not applied to the last tile of rows": Mutation(
        ROWS, "    activate(activation, c, N, count, columns);\n    for (int64_t i = 0; i < count; ++i)",
        "    if (r + count < rows) activate(activation, c, N, count, columns);\n"
        "    for (int64_t i = 0; i < count; ++i)",
        "test_cpu.py::test_batches_and_threads",
    ),
    "keys: the last row after whole squares is not transposed": Mutation(
        ROWS, "for (; i0 < rows; ++i0)", "for (; i0 + 1 < rows; ++i0)", "test_cpu.py::test_batches_and_threads"
    ),
    "keys: those of a head are sought where its values are": Mutation(
        ATTENTION, "from.k_t + qk_start * from.ldk, from.v + v_start,",
        "from.k_t + v_start * from.ldk, from.v + v_start,", "test_cpu.py::test_batches_and_threads",
    ),
    "keys: normalised with the weights of the queries": Mutation(
        ATTENTION, "heads.qk_norm + 2 * width, heads.qk_norm + 3 * width", "heads.qk_norm, heads.qk_norm + width",
        "test_packing.py::test_k_bias_stays_with_qk_norm",
    ),
    "softmax: no maximum": Mutation(
        ATTENTION, "exp(load(s + j) - highest)", "exp(load(s + j))",
        "test_operators.py::test_large_scores_do_not_overflow"
    ),
    "softmax: the maximum of the first vector of scores": Mutation(
        ATTENTION, "  for (int64_t j = W; j < padded; j += W) top = larger(load(s + j), top);\n", "",
        "test_operators.py::test_large_scores_do_not_overflow",
    ),
    "softmax: scores past the last key count": Mutation(
        ATTENTION, "s[j] = -__builtin_inff();", "s[j] = 0.0f;", "test_cpu.py::test_batches_and_threads"
    ),
    "softmax: rows of a tile divided by the sum of the first": Mutation(
        ATTENTION, "load(out + i * ldo + j) * inverse[i]", "load(out + i * ldo + j) * inverse[0]",
        "test_cpu.py::test_batches_and_threads",
    ),
    "chain: no wait between segments": Mutation(
        CHAIN,
        "    if (segment > 0) wait_for(done + segment - 1, static_cast<int32_t>(blocks_of(segment - 1)), "
        "scratch.lost_time);\n",
        "", "test_chain.py::test_workers_share_images_and_buffers",
    ),
    "chain: the last block of a segment is not waited for": Mutation(
        CHAIN, "static_cast<int32_t>(blocks_of(segment - 1)), scratch",
        "static_cast<int32_t>(blocks_of(segment - 1) - 1), scratch",
        "test_chain.py::test_workers_share_images_and_buffers",
    ),
    "chain: one set of keys and values for all segments": Mutation(
        CHAIN, "(slot_of_[image] - 1) + attention % 2]", "(slot_of_[image] - 1)]",
        "test_chain.py::test_workers_share_images_and_buffers",
    ),
    "chain: an image takes the buffers of its neighbour too": Mutation(
        CHAIN, "buffers_[2 * (slot_of_[image] - 1) + attention % 2]", "buffers_[slot_of_[image] - 1 + attention % 2]",
        "test_chain.py::test_workers_share_images_and_buffers",
    ),
    "chain: all images take the buffers of one worker": Mutation(
        CHAIN, "shape_.batch <= workers_ ? image : worker;", "shape_.batch <= workers_ ? image : 0;",
        "test_chain.py::test_workers_share_images_and_buffers",
    ),
    "chain: num_queries is ignored": Mutation(
        CHAIN, "segment == segments_ - 1 ? shape_.queries : shape_.tokens;\n    run_rows",
        "shape_.tokens;\n    run_rows", "test_chain.py::test_chain_of_a_small_transformer",
    ),
    "chain: the last query that is wanted has no q": Mutation(
        CHAIN, "min(rows, shape_.queries - r0)", "min(rows, shape_.queries - r0 - 1)",
        "test_chain.py::test_chain_of_a_small_transformer",
    ),
    "chain: rows of bytes are as wide as the first matrix reads": Mutation(
        CHAIN, "for (const Matrix* w : {&first, &second})", "for (const Matrix* w : {&first})",
        "test_int8.py::test_chain_with_qk_norm_and_close_to_float64",
    ),
    "int8: zero point of the first row of a tile": Mutation(
        INT8, "* -a.zeros[first_row + i];", "* -a.zeros[first_row];", "test_int8.py::test_awkward_rows"
    ),
    "int8: scale of the first row of a tile": Mutation(
        INT8, "acc[i][v], Vec) * (a.scales[first_row + i] * scale)", "acc[i][v], Vec) * (a.scales[first_row] * scale)",
        "test_int8.py::test_awkward_rows",
    ),
    "int8: weights after the last group of four are not in the sum": Mutation(
        INT8, "for (int64_t i = 0; i < k; ++i) sum += row[i];",
        "for (int64_t i = 0; i < k / 4 * 4; ++i) sum += row[i];",
        "test_int8.py::test_awkward_rows",
    ),
    "int8: the range of a row includes what stands behind it": Mutation(
        INT8, "    store(x + columns, Vec{});  // zeros do not change the range\n", "",
        "test_rounded.py::test_what_stands_behind_a_row_does_not_count",
    ),
    "int8: NaN and infinity become integers": Mutation(
        INT8, " + sum_lanes(poison);", ";", "test_int8.py::test_a_row_that_is_not_finite_gives_nan_and_harms_no_other"
    ),
    "bfloat16: ties away from zero": Mutation(
        BF16, "bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x8000",
        "test_bf16.py::test_rows_are_rounded_to_the_nearest"
    ),
    "bfloat16: the last value of an odd number is left out": Mutation(
        BF16, "const Vec even = 2 * i < rows ?", "const Vec even = 2 * i + 1 < rows ?",
        "test_bf16.py::test_chain_with_qk_norm_and_close_to_float64",
    ),
    "bfloat16: what stands behind a row meets its weights": Mutation(
        BF16, "  store(x + columns + W, Vec{});\n", "",
        "test_rounded.py::test_what_stands_behind_a_row_does_not_count",
    ),
    "checksum: the last bytes are not read": Mutation(
        CHECKSUM, "__builtin_memcpy(last, p, static_cast<size_t>(left));",
        "__builtin_memcpy(last, p, static_cast<size_t>(left / 4 * 4));",
        "test_stamp.py::test_one_flipped_bit_is_noticed_wherever_it_is",
    ),
    "checksum: the order of the chains does not count": Mutation(
        CHECKSUM, "      sum = (sum ^ chains[i][lane]) * 0x9fb21c651e98df25u;\n      sum ^= sum >> 29;",
        "      sum += chains[i][lane] * 0x9fb21c651e98df25u;",
        "test_stamp.py::test_changes_of_many_words_that_could_cancel_are_noticed",
    ),
    "checksum: the order of the tensors does not count": Mutation(
        OPERATORS, "  return checksum(sums.data(), static_cast<int64_t>(sums.size() * sizeof(uint64_t)));",
        "  uint64_t all = 0;\n  for (uint64_t sum : sums) all += sum;\n  return all;",
        "test_stamp.py::test_tensors_that_change_places_or_shape_are_noticed",
    ),
    "checksum: only whole pieces are read": Mutation(
        OPERATORS, "begin < spans[2 * i + 1]; begin += kPiece", "begin + kPiece <= spans[2 * i + 1]; begin += kPiece",
        "test_stamp.py::test_one_flipped_bit_is_noticed_wherever_it_is",
    ),
    "embedding: all channels are read from one place": Mutation(
        PRIMITIVES, "corner + (c * p.height + i) * p.width", "corner + (c * p.patch_height + i) * p.width",
        "test_cpu.py::test_embedding",
    ),
    "embedding: patches take the positions of the first tokens": Mutation(
        PRIMITIVES, "add_vectors(base + place, c", "add_vectors(base + place - own * n, c",
        "test_cpu.py::test_embedding",
    ),
    "operators: the softmax scale is not read": Mutation(
        OPERATORS, "static_cast<float>(constants[2])}", "1.0f}", "test_packing.py::test_k_bias_stays_with_qk_norm"
    ),
    "operators: a plan that leads elsewhere is admitted": Mutation(
        ROWS, "plan->base != next || ", "", "test_cpu.py::test_the_operators_refuse_plans_that_lead_elsewhere"
    ),
    "operators: a column past the end is admitted": Mutation(
        OPERATORS, "kept[i] < features, \"columns", "kept[i] <= features, \"columns",
        "test_cpu.py::test_column_lists_are_checked",
    ),
}  # fmt: skip


class Build:
    """A copy of the tree and its native build for one instruction set, which after the first time compiles only what a
    fault changes.

    Args:
        folder: Where they go.
        extend: What is done to the copy before it is built.
    """

    def __init__(self, folder: Path, extend: Callable[[Path], None] = lambda folder: None) -> None:
        self.folder, self.tree = folder, folder / "build"
        copy_tree(folder, "tests", "python", "bench", "pyproject.toml", "CMakeLists.txt", "csrc")
        copy_tree(folder, "gohsp_kernels", leave=("*.so",))
        sets = folder / "csrc" / "cpu" / "isa" / "isa.def"
        kept = [line for line in sets.read_text().splitlines() if line.startswith(("//", "GOHSP_ISA_SET(scalar,"))]
        sets.write_text("\n".join(kept) + "\n")
        extend(folder)
        options = {"GOHSP_CUDA": "OFF", "GOHSP_CHECKS": "ON", "BUILD_TESTING": "OFF", "CMAKE_BUILD_TYPE": "Release",
                   "Python_EXECUTABLE": sys.executable, "CMAKE_MAKE_PROGRAM": tool("ninja")}  # fmt: skip
        defined = [f"-D{name}={value}" for name, value in options.items()]
        check([tool("cmake"), "-S", str(folder), "-B", str(self.tree), "-G", "Ninja", *defined])
        self.make()

    def make(self) -> None:
        """Build what the Python tests load, and put it where they look for it."""
        check([tool("ninja"), "-C", str(self.tree), "_C_cpu", "_checks"])
        for module in self.tree.glob("*.so"):
            shutil.copy(module, self.folder / "gohsp_kernels")

    def first_failure(self, *tests: str) -> str:
        """Return the first of some tests that fails, or the empty string."""
        arguments = [*(f"tests/gohsp_kernels/{test}" for test in tests), "--hypothesis-seed=0"]
        return first_failure(self.folder, arguments, {"GOHSP_CPU_CAPABILITY": "scalar"}, dies=True)

    def find(self, mutation: Mutation) -> str:
        """Build a mutant and return the test that finds it, or the empty string."""
        with planted(self.folder / "csrc" / mutation.file, mutation):
            self.make()
            return self.first_failure(mutation.test)


def tool(name: str) -> str:
    """Return the path of a build tool: that of this Python's environment, or the one on PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=path)
    assert found is not None, f"{name} was not found (make setup installs it)"
    return found


def check(command: list[str]) -> None:
    """Run a command that has to succeed; what it says is shown if it does not."""
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def main(names: list[str]) -> int:
    mutations = chosen(names, MUTATIONS)
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder))
        failure = build.first_failure(*sorted({mutation.test for mutation in mutations.values()}))
        assert not failure, f"a test fails without any fault: {failure}"
        return report(mutations, build.find)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
