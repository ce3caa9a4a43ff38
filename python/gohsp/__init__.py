# SPDX-License-Identifier: Apache-2.0
"""gohsp: heterogeneous pruning of vision transformers."""

from gohsp.compress import compress, densify
from gohsp.count import count
from gohsp.io import load, save
from gohsp.mask import BlockMask, ModelMask

__all__ = ["BlockMask", "ModelMask", "compress", "count", "densify", "load", "save"]
