# SPDX-License-Identifier: Apache-2.0
"""Pruning by several processes, each with its own share of the images: sums go over all of them, the rest is alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from gohsp.masks.mask import ModelMask


@dataclass(frozen=True)
class Share:
    """Which images are this process's, in the order of the processes.

    Attributes:
        first: Number of the first one.
        images: How many there are.
        total: How many all processes have.
        shared: Whether there are other processes.
    """

    first: int
    images: int
    total: int
    shared: bool = False

    @staticmethod
    def of(images: int, shared: bool) -> Share:
        """Return the share of this process, which has so many images; every process of the group calls this."""
        if not shared:
            return Share(0, images, images)
        counts: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(counts, images)
        return Share(sum(counts[: dist.get_rank()]), images, sum(counts), True)

    def add_up_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over all processes."""
        if self.shared:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def of_first(self, tensor: Tensor) -> Tensor:
        """Return the tensor that the first process has in this place; their sizes may differ."""
        if not self.shared:
            return tensor
        found = [tensor.cpu()]
        dist.broadcast_object_list(found, 0)
        return found[0].to(tensor.device)

    def every(self, step: int) -> slice:
        """Return which of its images this process takes, where all together take each so many."""
        return slice(-self.first % step, None, step)


def check_shared(shared: bool) -> None:
    """Refuse to share where there is nobody to share with.

    Raises:
        ValueError: torch.distributed has no process group.
    """
    if shared and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "shared: wanted a process group, as torchrun and torch.distributed.init_process_group or Accelerate make "
            "one, found none"
        )


def check_agreement(mask: ModelMask) -> None:
    """Refuse masks that differ between processes: these did not call alike, or their machines compute differently.

    Raises:
        RuntimeError: They differ.
    """
    own = hashlib.sha256(repr(mask.to_dict()).encode()).hexdigest()
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if len(set(found)) > 1:
        raise RuntimeError("shared: the processes found different masks; each has to call with the same arguments")
