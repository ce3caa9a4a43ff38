# SPDX-License-Identifier: Apache-2.0
"""gohsp: heterogeneous pruning of vision transformers."""

from gohsp.count import count
from gohsp.mask import BlockMask, ModelMask

__all__ = ["BlockMask", "ModelMask", "count"]
