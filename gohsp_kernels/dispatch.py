# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs a call, and why another one cannot.

The rule: a backend that the user named (argument, :func:`use_backend` or the environment variable ``GOHSP_BACKEND``)
runs or raises with its reason; ``"auto"`` takes the first that can run, and says once in the log why a faster one was
passed over.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from . import cpu, cuda, reference  # noqa: F401 (they register themselves)
from .formats import FORMATS
from .registry import BACKENDS, Request
from .triton import support  # noqa: F401

log = logging.getLogger("gohsp_kernels")

WEIGHTS = tuple(FORMATS)
"""Names of the formats that the weights of a frozen chain can have: see :data:`gohsp_kernels.formats.FORMATS`."""

ENVIRONMENT_VARIABLE = "GOHSP_BACKEND"


@dataclass(frozen=True)
class Support:
    """Whether something can run and, where not, why. True in a boolean context when it can."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def _check_name(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: wanted one of 'auto', {', '.join(map(repr, BACKENDS))}; got {name!r}")
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
        backend: "reference", "cpu", "cuda", "triton", or one that was registered.
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
    request = Request(torch.device(device), dtype, needs_grad, compute_capability, widest_head, weights)
    return _supported(backend, request)


def _missing(backend: str, request: Request) -> str:
    if request.operator and request.operator not in BACKENDS[backend].operators:
        return f"has no {request.operator}"
    if unknown := request.parts.difference(BACKENDS[backend].parts):
        return f"has no kernel for {' or '.join(sorted(unknown))}"
    return BACKENDS[backend].missing(request)


def _supported(backend: str, request: Request) -> Support:
    reason = _missing(backend, request)
    return Support(not reason, reason)


def backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Support]:
    """What can run here and, where not, why: one :class:`Support` for each backend."""
    request = Request(torch.device(device), dtype)
    return {name: _supported(name, request) for name in _in_order(request)}


class use_backend(ContextDecorator):
    """Run every call in the ``with`` block on the backend ``name``, or on the best one for ``"auto"``.

    It holds for the calling thread. Threads that are started meanwhile follow the environment variable. Without a
    ``with`` block, or a function that it decorates, it does nothing but warn.

    Raises:
        ValueError: for a backend that does not exist. One that exists but cannot run a call raises at that call.
    """

    def __init__(self, name: str) -> None:
        self._used = True  # where the name is refused there is nothing to warn of
        self._name = _check_name(name)
        self._used = False

    def __enter__(self) -> None:
        self._used = True
        self._token = _selected.set(self._name)

    def __exit__(self, *error: object) -> None:
        _selected.reset(self._token)

    def __call__(self, function: Any) -> Any:
        self._used = True
        return super().__call__(function)

    def _recreate_cm(self) -> use_backend:  # for each call of a function that it decorates
        return use_backend(self._name)

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                f"use_backend({self._name!r}) did nothing: it holds in the block of a with statement. For a whole "
                f"process set {ENVIRONMENT_VARIABLE}={self._name}",
                stacklevel=2,
            )


def selected() -> str:
    """The backend that calls of this thread run on: the name of one, or ``"auto"``."""
    return _selected.get()


def _in_order(request: Request) -> list[str]:
    """The backends in the order in which "auto" tries them."""
    return sorted(BACKENDS, key=lambda name: -BACKENDS[name].priority(request))


def choose(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    widest_head: int = 0,
    rows: int = 0,
    operator: str = "",
    parts: frozenset[str] = frozenset(),
) -> str:
    """The backend that runs a call of an operator on ``rows`` rows of activations.

    Raises:
        ValueError: if the named backend does not exist.
        RuntimeError: if the named backend cannot run the call; the message is its reason.
    """
    wanted = selected() if backend is None else _check_name(backend)
    request = Request(device, dtype, needs_grad, widest_head=widest_head, rows=rows, operator=operator, parts=parts)
    if wanted != "auto":
        if reason := _missing(wanted, request):
            raise RuntimeError(f"backend {wanted!r}: {reason}")
        return wanted
    for name in _in_order(request):
        reason = BACKENDS[name].only_named(request) or _missing(name, request)
        if not reason:
            return name
        _log_once(f"backend {name!r} passed over: {reason}")
    raise AssertionError("the reference backend runs everything")


@torch.compiler.disable
def _log_message(message: str) -> None:
    log.info(message)


def _log_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _already_logged:
        return
    _already_logged.add(message)
    _log_message(message)
