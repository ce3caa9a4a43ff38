# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs a call, and why another one cannot.

The rule: a backend that the user named (argument, :func:`use_backend` or the environment variable ``GOHSP_BACKEND``)
runs or raises with its reason; ``"auto"`` takes the first that can run, and says once in the log why a faster one was
passed over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, cuda
from .triton import support as triton_support

log = logging.getLogger("gohsp_kernels")

PREFERENCE = ("cpu", "cuda", "triton", "reference")
"""Backends, the one that "auto" would rather take first; cuda and triton change places as :func:`_preference` says."""

WEIGHTS = ("float32", "bfloat16", "int8")
"""Forms that the weights of a frozen chain can have: see :func:`gohsp_kernels.reference.bf16_linear` and
:func:`gohsp_kernels.reference.int8_linear`."""

ENVIRONMENT_VARIABLE = "GOHSP_BACKEND"

UNPROVEN_BACKWARD = "its backward kernels have not been run on a GPU yet; it trains where it is named"
"""Why "auto" leaves calls that need gradients to the reference."""


@dataclass(frozen=True)
class Support:
    """Whether something can run and, where not, why. True in a boolean context when it can."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def _check_name(name: str) -> str:
    if name not in ("auto", *PREFERENCE):
        raise ValueError(f"backend: wanted one of 'auto', {', '.join(map(repr, PREFERENCE))}; got {name!r}")
    return name


# Of the thread (or task) that calls, so that a block of one thread neither reaches nor outlives that of another.
_from_environment = _check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))
_selected: ContextVar[str] = ContextVar("gohsp_kernels_backend", default=_from_environment)
_already_logged: set[str] = set()


def can_run(
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    needs_grad: bool = False,
    compute_capability: tuple[int, int] | None = None,
    widest_head: int = 0,
    weights: str = "float32",
) -> Support:
    """Tell whether ``backend`` can run a call on tensors of this device and dtype.

    Args:
        backend: "reference", "cpu", "cuda" or "triton".
        device: where the tensors are.
        dtype: of the activations and weights.
        needs_grad: whether the result must be differentiable.
        compute_capability: of a GPU that need not be there; by default that of ``device``.
        widest_head: most channels that a head has.
        weights: "float32" for weights as they are, "bfloat16" and "int8" for what ``SublayerChain.frozen(weights=...)``
            makes.

    Raises:
        ValueError: for a backend or for weights that do not exist.
    """
    _check_name(backend)
    if weights not in WEIGHTS:
        raise ValueError(f"weights: wanted one of {', '.join(map(repr, WEIGHTS))}; got {weights!r}")
    if weights != "float32" and backend != "cpu":
        return Support(False, f"has no {weights} weights; the backend 'cpu' has")
    reason = _missing(backend, torch.device(device), dtype, needs_grad, compute_capability, widest_head, weights)
    return Support(not reason, reason)


def _missing(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    capability: tuple[int, int] | None,
    widest_head: int,
    weights: str,
) -> str:
    if backend == "cpu":
        return cpu.missing(device, dtype, needs_grad, weights)
    if backend == "cuda":
        return cuda.missing(device, dtype, needs_grad, capability, widest_head)
    if backend == "triton":
        return triton_support.missing(device, dtype, capability, widest_head)
    return ""  # the reference runs everything


def backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Support]:
    """What can run here and, where not, why: one :class:`Support` for each backend."""
    return {name: can_run(name, device, dtype) for name in PREFERENCE}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call in the ``with`` block on the backend ``name``, or on the best one for ``"auto"``.

    It holds for the calling thread. Threads that are started meanwhile follow the environment variable.

    Raises:
        ValueError: for a backend that does not exist. One that exists but cannot run a call raises at that call.
    """
    token = _selected.set(_check_name(name))
    try:
        yield
    finally:
        _selected.reset(token)


def selected() -> str:
    """The backend that calls of this thread run on: the name of one, or ``"auto"``."""
    return _selected.get()


def needs_grad(tensors: Iterable[object]) -> bool:
    """Whether a call on these tensors must be differentiable, backwards or forwards."""
    if forward_ad._current_level >= 0:
        return True  # a tangent may be on any of them, whatever requires_grad says
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _preference(device: torch.device, rows: int) -> tuple[str, ...]:
    """The order in which "auto" tries the backends for a call on ``rows`` rows of activations."""
    if device.type == "cuda" and not cuda.goes_first(device, rows):
        return ("cpu", "triton", "cuda", "reference")
    return PREFERENCE


def choose(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    widest_head: int = 0,
    rows: int = 0,
) -> str:
    """The backend that runs a call on ``rows`` rows of activations.

    Raises:
        ValueError: if the named backend does not exist.
        RuntimeError: if the named backend cannot run the call; the message is its reason.
    """
    wanted = selected() if backend is None else _check_name(backend)
    if wanted != "auto":
        support = can_run(wanted, device, dtype, needs_grad=needs_grad, widest_head=widest_head)
        if not support:
            raise RuntimeError(f"backend {wanted!r}: {support.reason}")
        return wanted
    for name in _preference(device, rows):
        if name in ("cuda", "triton") and device.type == "cpu":
            continue  # what runs there is for tests, to be named: Triton's interpreter
        if name == "triton" and needs_grad:
            _log_once(f"backend 'triton' passed over: {UNPROVEN_BACKWARD}")
            continue
        support = can_run(name, device, dtype, needs_grad=needs_grad, widest_head=widest_head)
        if support:
            return name
        _log_once(f"backend {name!r} passed over: {support.reason}")
    raise AssertionError("the reference backend runs everything")


@torch.compiler.disable
def _log_message(message: str) -> None:
    log.info(message)


def _log_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _already_logged:
        return
    _already_logged.add(message)
    _log_message(message)
