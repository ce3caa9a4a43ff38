# SPDX-License-Identifier: Apache-2.0
"""The emulation itself: planted faults are found and named, and fragments lie as the PTX manual says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from .helpers import checks

SOURCE = (Path(__file__).parents[3] / "csrc/cuda/emulate/checks.cpp").read_text().splitlines()


def line(mark: str) -> str:
    """The place in the source of the planted kernels that bears a comment."""
    (number,) = (i for i, text in enumerate(SOURCE, 1) if text.endswith(f"// {mark}"))
    return f"checks.cpp:{number}"


FAULTS = {
    "missing_barrier": "race in shared memory: {race: first}, {race: second}",
    "missing_second_barrier": "race in shared memory: {overwritten: first}, {overwritten: second}",
    "missing_warp_barrier": "race in shared memory",
    "warp_barrier_between_warps": "race in shared memory",
    "read_before_write": "read of shared memory that nobody wrote",
    "outside_shared_memory": "access outside shared memory: bytes 1024 to 1028 of 1024",
    "misaligned_shared_memory": "misaligned access of shared memory",
    "outside_tensor": "access outside the tensors of the call",
    "misaligned_tensor": "misaligned access of a tensor",
    "barrier_that_some_skip": "divergent barrier.*has left the kernel",
    "two_barriers": "divergent barrier: {apart: first}, {apart: second}",
    "shuffle_without_some_lanes": "an instruction of a whole warp that not all its lanes reach",
    "copy_without_wait": "read of an asynchronous copy that was not waited for",
    "wait_for_too_few": "read of an asynchronous copy that was not waited for",
    "copy_seen_by_another_thread": "race in shared memory",
    "copy_over_what_is_read": "race in shared memory|read of an asynchronous copy",
    "two_writers": "write of what another thread of the launch wrote",
    "reads_what_another_block_wrote": "read of what another thread of the launch wrote",
}
"""Part of the message for each planted kernel; {mark} stands for the place of a marked line, in any order."""


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    with pytest.raises(checks.Fault) as fault:
        checks.run_kernel(name)
    wanted = FAULTS[name]
    places = [line(mark) for mark in re.findall(r"\{(.*?)\}", wanted)]
    assert re.search(wanted.split("{")[0], str(fault.value)), fault.value
    assert all(place in str(fault.value) for place in places), fault.value
    assert "checks.cpp:" in str(fault.value) or "operands.cuh:" in str(fault.value)


def test_a_correct_kernel_passes_and_computes() -> None:
    for _ in range(2):  # a fault before it leaves nothing behind
        with pytest.raises(checks.Fault):
            checks.run_kernel("missing_barrier")
        thread = np.arange(64)
        copied = np.where(thread // 4 % 2 == 0, thread, 0)  # chunks of odd threads are zeros
        neighbour, other = (thread ^ 1) + 1, (thread ^ 32) + 1
        sums = (neighbour + other).reshape(2, 32).sum(1).repeat(32)
        assert np.array_equal(checks.run_kernel("correct"), copied + sums)


def test_bank_conflicts_are_counted() -> None:
    checks.bank_conflicts()
    checks.run_kernel("rows_in_the_same_banks")
    assert checks.bank_conflicts() == 2 * 2 * 4  # blocks, warps, matrices
    assert checks.bank_conflicts() == 0


# --- fragments: the formulas of the PTX manual, written down once more ------------------------------------------------
def a_place(lane: int, i: int, per_register: int) -> tuple[int, int]:
    """Row and column of number ``i`` of a lane's fragment of A (mma.m16n8k16 and m16n8k8)."""
    group, thread = lane >> 2, lane % 4
    register, low = divmod(i, per_register)
    return group + 8 * (register % 2), thread * per_register + low + 4 * per_register * (register // 2)


def b_place(lane: int, i: int, per_register: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    register, low = divmod(i, per_register)
    return thread * per_register + low + 4 * per_register * register, group


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (i >= 2), (lane % 4) * 2 + (i & 1)


def registers(matrix: np.ndarray, place, count: int, per_register: int) -> np.ndarray:
    """A matrix of unsigned numbers as registers [32, count]."""
    result = np.zeros((32, count), dtype=np.uint32)
    for lane in range(32):
        for i in range(count * per_register):
            shift = 32 // per_register * (i % per_register)
            result[lane, i // per_register] |= np.uint32(int(matrix[place(lane, i, per_register)]) << shift)
    return result


def as_bits(matrix: torch.Tensor) -> np.ndarray:
    unsigned = np.uint32 if matrix.dtype == torch.float32 else np.uint16
    signed = torch.int32 if matrix.dtype == torch.float32 else torch.int16
    return matrix.view(signed).numpy().view(unsigned)


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("f16", torch.float16, 1e-6),
        ("bf16", torch.bfloat16, 1e-6),
        ("tf32", torch.float32, 1e-3),
        ("f32", torch.float32, 1e-6),
    ],
)
def test_fragments_against_a_plain_product(precision: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    depth, per_register = (8, 1) if dtype == torch.float32 else (16, 2)
    a = torch.randn(16, depth, generator=generator).to(dtype)
    b = torch.randn(depth, 8, generator=generator).to(dtype)
    result = checks.multiply(
        precision,
        registers(as_bits(a), a_place, 4, per_register),
        registers(as_bits(b), b_place, 2, per_register),
    )
    truth = (a.double() @ b.double()).numpy()
    for lane in range(32):
        for i in range(4):
            assert abs(result[lane, i] - truth[c_place(lane, i)]) < 16 * tolerance
    if precision == "tf32":
        assert np.abs(result).max() > 0 and any(
            abs(result[lane, i] - truth[c_place(lane, i)]) > 1e-6 for lane in range(32) for i in range(4)
        ), "tf32 rounds its operands"


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed: bool) -> None:
    numbers = np.arange(32 * 8, dtype=np.uint32).reshape(4, 8, 8)  # matrix, row, column
    rows = numbers.reshape(32, 8)
    words = (rows[:, 0::2] | rows[:, 1::2] << 16).astype(np.uint32)
    result = checks.load_matrices(words, transposed)
    for lane in range(32):
        for m in range(4):
            matrix = numbers[m].T if transposed else numbers[m]
            row, column = lane // 4, lane % 4 * 2
            assert result[lane, m] == matrix[row, column] | int(matrix[row, column + 1]) << 16


@pytest.mark.parametrize(("precision", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_is_that_of_torch(precision: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(4000) * 10.0**e for e in range(-9, 6)])
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 6.1e-5, float("inf"), float("-inf"), float("nan")]
    x = torch.cat([x, torch.tensor(special), torch.arange(2048) + 0.5, (torch.arange(256) + 0.5) * 2.0**-24])
    result = torch.tensor(checks.round_to(precision, x.tolist()))
    assert torch.equal(result.nan_to_num(1e30), x.to(dtype).float().nan_to_num(1e30))


def test_tf32_keeps_eleven_bits() -> None:
    assert checks.round_to("tf32", [1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-12, -3.0]) == [
        1 + 2.0**-10, 1 + 2.0**-10, 1.0, -3.0,
    ]  # fmt: skip
