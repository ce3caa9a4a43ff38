# SPDX-License-Identifier: Apache-2.0
"""Checks of what users give to public functions: each error names the argument, what was wanted and what came."""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

from gohsp.files import shown

LARGEST = 2**63 - 1
"""What torch and C++ take."""


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Check what an argument is.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: wanted {wanted}, got {type(value).__name__}")


def check_whole(name: str, value: object, least: int, most: int = LARGEST) -> None:
    """Check a whole number, which may be one of NumPy's.

    Raises:
        TypeError: It is something else.
        ValueError: It is out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: wanted a whole number, got {type(value).__name__}")
    if not least <= int(value) <= most:
        raise ValueError(f"{name}: wanted a whole number {_among(least, most)}, got {shown(value)}")


def check_number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Check a finite number, which may be one of NumPy's.

    Raises:
        TypeError: It is something else.
        ValueError: It is out of its range, infinite or none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: wanted a number, got {type(value).__name__}")
    number: Any = value
    if not (least <= number <= most and abs(number) <= sys.float_info.max):
        raise ValueError(f"{name}: wanted a finite number {_among(least, most)}".rstrip() + f", got {shown(value)}")


def _among(least: float, most: float) -> str:
    if least == -math.inf:
        return ""
    return f"from {least} up" if most in (LARGEST, math.inf) else f"from {least} to {most}"


def check_seed(value: Any) -> None:
    """Check a seed of torch's generators.

    Raises:
        TypeError: It is no whole number.
        ValueError: It has more than 64 bits.
    """
    check_whole("seed", value, -(2**63), LARGEST)


def check_name(name: str, value: Any, names: Collection[str]) -> None:
    """Check one of some names.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: wanted one of {', '.join(names)}, got {shown(value)}")


def check_sequence(name: str, value: Any, wanted: str) -> None:
    """Check a list or another sequence, which a string is not.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: wanted {wanted}, got {type(value).__name__}")


def check_path(name: str, value: Any) -> None:
    """Check the name of a file or folder.

    Raises:
        TypeError: It is something else.
    """
    check_kind(name, value, (str, os.PathLike), "a path")


def check_callable(name: str, value: Any) -> None:
    """Check a function, or None.

    Raises:
        TypeError: It is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}: wanted a function, got {type(value).__name__}")
