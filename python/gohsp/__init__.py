# SPDX-License-Identifier: Apache-2.0
"""gohsp: heterogeneous pruning of vision transformers."""

from importlib import import_module
from typing import Any

from gohsp.compress import compress, densify
from gohsp.count import count
from gohsp.freeze import freeze
from gohsp.io import load, save
from gohsp.mask import BlockMask, ModelMask

__all__ = ["BlockMask", "ModelMask", "compress", "count", "densify", "freeze", "load", "save"]

_ON_FIRST_USE = {"rank_heads": "gohsp.ranking", "prune": "gohsp.prune", "PruneResult": "gohsp.prune"}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'gohsp' has no attribute {name!r}")
    # Stored, because importing gohsp.prune binds the name of the function to the module.
    globals()[name] = getattr(import_module(_ON_FIRST_USE[name]), name)
    return globals()[name]
