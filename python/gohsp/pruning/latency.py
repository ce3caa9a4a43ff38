# SPDX-License-Identifier: Apache-2.0
"""What the halves of a block cost on the machine at hand, in milliseconds, for budgets in time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from gohsp.arguments import check_whole
from gohsp.compress import compress
from gohsp.files import explain, read_json, shown, write_json
from gohsp.freeze import freeze
from gohsp.layers import FrozenBlocks
from gohsp.masks.mask import ModelMask
from gohsp.models.base import MAX_SIZE, Geometry
from gohsp.models.registry import open_model
from gohsp.progress import ticking
from gohsp.pruning.budget import BlockBudget
from gohsp.timing import interleave

NEURON_POINTS = 7  # widths of the MLP that are measured, evenly spaced up to the dense one


class LatencyTable(BaseModel):
    """Milliseconds of the attention half and the MLP half of a block, by heads and by neurons, as measured.

    Between the measured widths the table is linear. A head with fewer channels counts as the share of them that it
    keeps: measured are whole heads alone.

    Attributes:
        dim, num_heads, head_dim, hidden: Of the dense model.
        batch, threads: That it was measured with.
        outside: Everything that is not in the blocks.
        attention: One value for each number of heads from 1 up.
        neurons, mlp: The measured widths, ascending, and their values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dim: int = Field(ge=1, le=MAX_SIZE)
    num_heads: int = Field(ge=1, le=MAX_SIZE)
    head_dim: int = Field(ge=1, le=MAX_SIZE)
    hidden: int = Field(ge=1, le=MAX_SIZE)
    batch: int = Field(ge=1)
    threads: int = Field(ge=1)
    outside: float = Field(ge=0)
    attention: tuple[float, ...]
    neurons: tuple[int, ...]
    mlp: tuple[float, ...]

    @model_validator(mode="after")
    def _check_values(self) -> LatencyTable:
        if len(self.attention) != self.num_heads:
            raise ValueError(f"attention: wanted {self.num_heads} values, got {len(self.attention)}")
        if not self.neurons or len(self.mlp) != len(self.neurons):
            raise ValueError(f"mlp: wanted {len(self.neurons)} values, one for each of neurons, got {len(self.mlp)}")
        if self.neurons[0] < 1 or self.neurons[-1] != self.hidden or len(set(self.neurons)) < len(self.neurons):
            raise ValueError(f"neurons: wanted widths up to {self.hidden}, got {shown(self.neurons)}")
        for name, values in (("attention", self.attention), ("neurons", self.neurons), ("mlp", self.mlp)):
            if values[0] < 0 or any(after < before for before, after in pairwise(values)):
                raise ValueError(f"{name}: wanted ascending values from 0, got {shown(values)}")
        return self

    @classmethod
    def measure(cls, model: Any, batch: int = 1, rounds: int = 15) -> LatencyTable:
        """Measure frozen models that keep so many heads and neurons in every block, all interleaved.

        Args:
            model: Dense vision transformer that gohsp knows on the device that is to be measured.
            batch: Images of a call.
            rounds: Of the timing; medians count.

        Raises:
            TypeError, ValueError: The model is not one that gohsp can prune.
        """
        check_whole("batch", batch, 1)
        check_whole("rounds", rounds, 1)
        opened = open_model(model)
        size, family = opened.geometry, opened.family
        like, shape = next(model.parameters()), family.image_shape(model)
        if shape is None:
            raise ValueError("model: wanted one that is made for images of one size; got one that takes any")
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
        step = max(size.hidden // NEURON_POINTS // 16 * 16, 1)
        neurons = (*range(step, size.hidden, step), size.hidden)
        shapes = {("heads", h): (h, neurons[0]) for h in range(1, size.num_heads + 1)}
        shapes |= {("hidden", n): (1, n) for n in neurons[1:]}

        def runner(module: nn.Module) -> Callable[[], None]:
            def run() -> None:
                with torch.inference_mode():
                    module(images)
                    if images.is_cuda:
                        torch.cuda.synchronize()

            return run

        frozen = {
            str(key): freeze(compress(model, ModelMask.keep_first(model, heads=h, hidden=n)).eval())
            for key, (h, n) in shapes.items()
        }
        frozen["outside"] = _without_blocks(frozen[str(("heads", 1))])
        runs = {name: runner(module) for name, module in frozen.items()}
        with ticking("measure", None, rounds) as tick:
            timings = interleave(runs, rounds=rounds, after_round=tick)
        times = {name: 1e3 * timing.median for name, timing in timings.items()}
        outside, least = times["outside"], times[str(("heads", 1))]
        # What one head and the fewest neurons take together is split by their multiply-accumulates.
        tokens = family.tokens(model, *shape[1:])
        attention_macs = size.head_dim * (4 * size.dim + 2 * tokens)
        share = attention_macs / (attention_macs + 2 * size.dim * neurons[0])
        block = max(least - outside, 0.0) / size.depth
        extra = {key: (times[str(key)] - least) / size.depth for key in shapes}
        return cls(
            dim=size.dim,
            num_heads=size.num_heads,
            head_dim=size.head_dim,
            hidden=size.hidden,
            batch=batch,
            threads=torch.get_num_threads(),
            outside=outside,
            attention=_ascending([share * block + extra["heads", h] for h in range(1, size.num_heads + 1)]),
            neurons=neurons,
            mlp=_ascending([(1 - share) * block + (extra["hidden", n] if n > neurons[0] else 0.0) for n in neurons]),
        )

    def block_cost(self, budget: BlockBudget) -> tuple[float, float]:
        """Return the milliseconds of a block's halves."""
        heads = (budget.qk + budget.v) / (2 * self.head_dim)
        attention = np.interp(heads, np.arange(1, self.num_heads + 1), self.attention)
        return float(attention), float(np.interp(budget.hidden, self.neurons, self.mlp))

    def check(self, size: Geometry) -> None:
        """Check that the table was measured for blocks of a given size.

        Raises:
            ValueError: It was not.
        """
        wanted = (size.dim, size.num_heads, size.head_dim, size.hidden)
        if wanted != (self.dim, self.num_heads, self.head_dim, self.hidden):
            raise ValueError(
                f"latency: wanted a table for {size}, got one for dim={self.dim}, num_heads={self.num_heads}, "
                f"head_dim={self.head_dim}, hidden={self.hidden}"
            )

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_json(Path(path), self.model_dump())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It does not hold one.
        """
        data = read_json(Path(path))
        try:
            # As JSON, in which a number in quotes is none.
            return cls.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise ValueError(explain(error, str(path))) from error


def _without_blocks(model: nn.Module) -> nn.Module:
    """Return the frozen model with nothing in the place of its blocks; all else is shared."""
    blocks = next(module for module in model.modules() if isinstance(module, FrozenBlocks))
    # What deepcopy is told that it has met already is taken as it is.
    met: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**met, id(blocks): nn.Sequential()})


def _ascending(values: list[float]) -> tuple[float, ...]:
    """More never costs less: what noise says otherwise is lifted."""
    return tuple(float(value) for value in np.maximum.accumulate(values))
