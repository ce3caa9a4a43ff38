# SPDX-License-Identifier: Apache-2.0
"""What a model wants of its images and calls its classes: the part of timm's record that is saved with a model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from gohsp.files import explain

RECORD = "pretrained_cfg"
"""Where timm keeps it; resolve_model_data_config reads it there."""

_Pixels = Annotated[int, Field(ge=1, le=2**20)]
_Size = tuple[_Pixels, _Pixels, _Pixels]
_Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=2**12)]
_Share = Annotated[float, Field(gt=0, le=10)]


class _Preprocessing(BaseModel):
    """The entries by timm's names; those that are None are not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    input_size: _Size | None = None
    test_input_size: _Size | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] | None = None
    mean: _Channels | None = None
    std: _Channels | None = None
    crop_pct: _Share | None = None
    test_crop_pct: _Share | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    label_names: tuple[str, ...] | None = None
    label_descriptions: dict[str, str] | None = None


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return the entries that a model has, as plain values, or None where timm has no record of it.

    Raises:
        ValueError: One of them is of another type or out of its range.
    """
    record = getattr(model, RECORD, None)
    if not isinstance(record, dict):
        return None
    found = {name: record[name] for name in _Preprocessing.model_fields if record.get(name) is not None}
    return _read(found, f"model.{RECORD}")


def restore(model: nn.Module, described: Any) -> None:
    """Put what :func:`describe` gave into the record of a model; what was not there goes.

    Raises:
        ValueError: It is not what :func:`describe` gives.
    """
    found = _read(described, "plan.preprocessing")
    record = getattr(model, RECORD, None)
    kept = record if isinstance(record, dict) else {}
    others = {name: value for name, value in kept.items() if name not in _Preprocessing.model_fields}
    # default_cfg is timm's older name of the same record.
    model.pretrained_cfg = model.default_cfg = {**others, **found}  # type: ignore[assignment]


def _read(values: Any, where: str) -> dict[str, Any]:
    try:
        # As JSON, in which tuples and lists are one thing.
        return _Preprocessing.model_validate_json(json.dumps(values)).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ValueError(explain(error, where)) from error
    except TypeError as error:
        raise ValueError(f"{where}: wanted plain values, but {error}") from error
