# SPDX-License-Identifier: Apache-2.0
"""Layouts: what a kernel reads, derived from a mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """What a block keeps, as lists of indices into the dense block. Derived from a mask, never edited.

    All tensors are int64 on the CPU, sorted and unique. A kept head whose V channels are all pruned adds nothing to the
    block and is not here; a kept head without QK channels is here with a QK width of 0 (it gives the mean of V).

    Attributes:
        heads: Indices of the kept heads.
        qk_widths, v_widths: Channels of each kept head, in the order of ``heads``.
        q_rows, k_rows, v_rows: Rows of the dense qkv, head after head.
        proj_cols: Input columns of the dense proj, in the order of ``v_rows``.
        hidden: Neurons: rows of fc1, columns of fc2.
        attn_in, attn_out, mlp_in, mlp_out: Residual features that qkv reads, proj writes, fc1 reads and fc2 writes;
            None means all of them.
    """

    heads: tuple[int, ...]
    qk_widths: tuple[int, ...]
    v_widths: tuple[int, ...]
    q_rows: Tensor
    k_rows: Tensor
    v_rows: Tensor
    proj_cols: Tensor
    hidden: Tensor
    attn_in: Tensor | None
    attn_out: Tensor | None
    mlp_in: Tensor | None
    mlp_out: Tensor | None

    @cached_property
    def qkv_rows(self) -> Tensor:
        """Rows of the dense qkv in compact order: all q, then all k, then all v."""
        return torch.cat((self.q_rows, self.k_rows, self.v_rows))
