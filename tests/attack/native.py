# SPDX-License-Identifier: Apache-2.0
"""Hostile calls of the native operators: ``python -m tests.attack.native SEED COUNT``.

Each call is a good one with something changed: a number, or a tensor's dtype, shape, strides, device or contents. It
has to raise an exception of Python, or to give a result without memory that nobody wrote. A process of its own, which a
fault would end; each call is named before it is made. Prints how many calls were refused and how many were answered.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

import gohsp_kernels  # noqa: F401
from tests.gohsp_kernels.test_schemas import native_samples

NUMBERS = [-(2**63), -(2**62), -8, -1, 0, 1, 2, 3, 7, 8, 16, 255, 2**24, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
REFUSED = (RuntimeError, ValueError, TypeError, IndexError, OverflowError, NotImplementedError)

TENSORS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "on meta": lambda t, _: t.to("meta"),
    "float64": lambda t, _: t.double(),
    "float16": lambda t, _: t.half(),
    "int32": lambda t, _: t.int(),
    "int64": lambda t, _: t.long(),
    "complex": lambda t, _: t.to(torch.complex64),
    "transposed": lambda t, _: t.transpose(0, -1) if t.dim() else t,
    "flat": lambda t, _: t.reshape(-1),
    "a dimension more": lambda t, _: t[None],
    "a scalar": lambda t, _: t.new_zeros(()),
    "empty": lambda t, _: t.new_zeros(0),
    "empty and gigantic": lambda t, _: t.new_empty(2**40, 0),
    "gigantic and empty": lambda t, _: t.new_empty(0, 2**40),
    "one element less": lambda t, _: t.flatten()[:-1],
    "one row less": lambda t, _: t[:-1] if t.dim() else t,
    "last column away": lambda t, _: t[..., :-1] if t.dim() else t,
    "expanded": lambda t, _: t.new_zeros(()).expand(t.shape),
    "shifted": lambda t, _: t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t),
    "sparse": lambda t, _: t.to_sparse() if t.dim() else t,
    "needs a gradient": lambda t, _: t.clone().requires_grad_() if t.is_floating_point() else t,
    "None": lambda t, _: None,
}


def with_another_number(t: Tensor, rng: random.Random) -> Tensor:
    """A list of integers with one that is another."""
    changed = t.clone()
    changed.view(-1)[rng.randrange(t.numel())] = rng.choice(NUMBERS)
    return changed


def changed(value: Any, rng: random.Random) -> tuple[str, Any]:
    """Something else in the place of an argument, and what that is."""
    if isinstance(value, Tensor):
        if value.dtype == torch.int64 and value.numel() and rng.random() < 0.7:
            return "another number in it", with_another_number(value, rng)
        name = rng.choice(sorted(TENSORS))
        return name, TENSORS[name](value, rng)
    if isinstance(value, list):
        if rng.random() < 0.3:
            return "another length", value[:-1] if rng.random() < 0.5 else value * 2
        place = rng.randrange(len(value))
        what, new = changed(value[place], rng)
        return f"{what} at {place}", [*value[:place], new, *value[place + 1 :]]
    if isinstance(value, bool) or value is None:
        return "the opposite", not value
    if isinstance(value, float):
        return "another float", rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e308])
    return "another number", rng.choice(NUMBERS)


def main(seed: int, count: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    samples = native_samples()
    # Memory that nobody wrote is NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    told = {"tried": 0, "refused": 0, "answered": 0, "unwritten": []}
    for _ in range(count):
        name = rng.choice(sorted(samples))
        arguments, call = list(samples[name]), name
        for _ in range(rng.choice([1, 1, 2])):
            place = rng.randrange(len(arguments))
            with suppress(*REFUSED):  # what was changed once may allow no second change
                what, arguments[place] = changed(arguments[place], rng)
                call += f", argument {place}: {what}"
        print(call, file=sys.stderr, flush=True)
        told["tried"] += 1
        try:
            result = getattr(torch.ops.gohsp_kernels, name)(*arguments)
        except REFUSED:
            told["refused"] += 1
            continue
        told["answered"] += 1
        on_meta = result.device.type == "meta"
        if not on_meta and result.is_floating_point() and result.isnan().any() and "float" not in call:
            told["unwritten"].append(call)
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
