# SPDX-License-Identifier: Apache-2.0
"""Hostile calls of the operators: ``python -m tests.attack.operators SEED COUNT``.

The native operators, those for CUDA emulated, and the public ones on each backend (Triton interpreted), called through
torch and through their Python functions. Each call is a good one with something changed: a number, or a tensor's
dtype, shape, strides, device or contents. It has to raise an exception of Python, or to give a result without memory
that nobody wrote; that of a public operator has to be right. A process of its own, which a fault would end, as would a
minute for a call; it gets two gigabytes more than it has. Each call is named before it is made. Prints how many calls
of each kind were refused and how many were answered, and the faults.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import torch
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import testing
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


def changed(value: Any, rng: random.Random, backend: str) -> tuple[str, Any]:
    """Something else in the place of an argument, and what that is."""
    if rng.random() < 0.05:
        other = rng.choice(["a word", 1.5, None, True, [], [None], object(), 2**70])
        return f"{type(other).__name__}", other
    if isinstance(value, Tensor):
        if value.dtype == torch.int64 and value.numel() and rng.random() < 0.7:
            return "another number in it", with_another_number(value, rng)
        name = rng.choice(sorted(TENSORS))
        return name, TENSORS[name](value, rng)
    if isinstance(value, list):
        if rng.random() < 0.3:
            return "another length", value[:-1] if rng.random() < 0.5 else value * 2
        place = rng.randrange(len(value))
        what, new = changed(value[place], rng, backend)
        return f"{what} at {place}", [*value[:place], new, *value[place + 1 :]]
    if isinstance(value, bool) or value is None:
        return "the opposite", not value
    if isinstance(value, float):
        return "another float", rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e308])
    numbers = [n for n in NUMBERS if n != 2**24 or backend != "triton"]  # for which its interpreter takes hours
    return "another number", rng.choice(numbers)


Call = Callable[..., Any]


def native() -> dict[str, tuple[Call, list[Any]]]:
    """Functions of the native CPU operators with good arguments."""
    return {name: (_in_torch(name), list(arguments)) for name, arguments in native_samples().items()}


def emulated() -> dict[str, tuple[Call, list[Any]]]:
    """The same of the CUDA operators. That of the checksum is left out: it is told addresses, and reads there."""
    from tests.gohsp_kernels.cuda.test_operators import native_samples as samples

    return {name: (_in_torch(name), list(a)) for name, a in samples().items() if name != "cuda_checksum"}


def public() -> dict[str, tuple[Call, list[Any]]]:
    """The public operators, as exported graphs and as users call them."""
    functions: dict[str, tuple[Call, list[Any]]] = {}
    for name, call in testing.samples().items():
        functions[name] = (_in_torch(name), list(call.flat()))
        operator, x, queries = call.described()
        by_name = _by_name(getattr(gk, name), operator.flat_names())
        functions[f"{name} of Python"] = (by_name, [x, *operator.flat(queries)])
    return functions


def _in_torch(name: str) -> Call:
    return getattr(torch.ops.gohsp_kernels, name)


def _by_name(function: Call, names: list[str]) -> Call:
    return lambda x, *arguments: function(x, **dict(zip(names, arguments, strict=True)))


def is_right(function: Call, arguments: list[Any], result: Tensor) -> bool:
    """Whether a public operator gave what the reference gives in float64; right is what that has no room for."""
    if any(isinstance(a, float) and abs(a) > torch.finfo(torch.float32).max for a in arguments):
        return True  # which is infinite in float32
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    try:
        with gk.use_backend("reference"):
            truth = function(*exact)
    except REFUSED as error:
        return "can't allocate memory" in str(error)
    if result.shape != truth.shape or result.device != truth.device:
        return False
    if result.device.type == "meta" or not truth.isfinite().all() or not truth.numel():
        return True
    limit = testing.TOLERANCE.get(result.dtype, 1e-12) if result.dtype == arguments[0].dtype else 0.0
    return testing.error(result.to_dense(), truth.to_dense(), floor=1.0) <= limit


def unclear(error: Exception) -> bool:
    """Whether a message does not say in a line what was wanted. Those of torch's dispatcher have several."""
    text = str(error)
    return isinstance(error, ValueError) and (len(text.splitlines()) != 1 or len(text) > 1000)


def limit_memory() -> None:
    """Two gigabytes more than there are now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


# What an operator is told of lists that lie on a GPU, and cannot be read there without waiting for it.
BELIEVED = {"cuda_attention": ("argument 1", "argument 7", "argument 0"), "cuda_linear": (), "cuda_sublayers": ()}


class Attack:
    """Calls of one kind of operators, and what became of them."""

    def __init__(self, samples: dict[str, tuple[Call, list[Any]]], backend: str = "auto") -> None:
        self.samples, self.backend = samples, backend
        self.told = {"tried": 0, "refused": 0, "answered": 0}
        self.faults: list[str] = []
        for function, arguments in samples.values():  # loads what there is to load
            self._run(function, arguments)

    def _run(self, function: Call, arguments: list[Any]) -> Tensor:
        with gk.use_backend(self.backend):
            return function(*arguments)

    def call(self, rng: random.Random) -> None:
        """One hostile call."""
        name = rng.choice(sorted(self.samples))
        function, arguments = self.samples[name][0], list(self.samples[name][1])
        call = f"{name} on {self.backend}"
        for _ in range(rng.choice([1, 1, 2])):
            place = rng.randrange(len(arguments))
            with suppress(*REFUSED):  # what was changed once may allow no second change
                what, arguments[place] = changed(arguments[place], rng, self.backend)
                call += f", argument {place}: {what}"
        print(call, file=sys.stderr, flush=True)
        self.told["tried"] += 1
        try:
            result = self._run(function, arguments)
        except REFUSED as error:
            self.told["refused"] += 1
            if unclear(error) or ("outside the tensors" in str(error) and not self._believed(name, call)):
                self.faults.append(f"{call}: {error}")
        except Exception as error:
            self.faults.append(f"{call}: {type(error).__name__}: {error}")
        else:
            self.told["answered"] += 1
            unwritten = result.device.type != "meta" and result.is_floating_point() and result.isnan().any()
            if unwritten and "float" not in call and not self._believed(name, call):
                self.faults.append(f"{call}: memory that nobody wrote")
            elif name.partition(" ")[0] in testing.samples() and not is_right(function, arguments, result):
                self.faults.append(f"{call}: a wrong result")

    @staticmethod
    def _believed(name: str, call: str) -> bool:
        return name in BELIEVED and ("number in it" in call or any(f"{place}:" in call for place in BELIEVED[name]))


def main(seed: int, count: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    attacks = {"native": Attack(native()), "emulated": Attack(emulated())}
    attacks |= {backend: Attack(public(), backend) for backend in ("cpu", "reference", "triton")}
    # Memory that nobody wrote is NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in rng.choices(list(attacks), [4, 3, 3, 3, 2], k=count):
        signal.alarm(60)
        attacks[kind].call(rng)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    faults = [fault for attack in attacks.values() for fault in attack.faults]
    print(json.dumps({kind: attack.told for kind, attack in attacks.items()} | {"MiB more": more, "faults": faults}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
