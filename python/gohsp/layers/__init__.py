# SPDX-License-Identifier: Apache-2.0
"""The layers of compressed models: compact ones, chains of them, frozen ones, and the same in plain PyTorch."""

from gohsp.layers.attention import attend, head_angles, head_masks
from gohsp.layers.chain import PrunedBlocks, find_bare_blocks
from gohsp.layers.compact import (
    CompactLayerScale,
    CompactLinear,
    PrunedAttention,
    PrunedBlock,
    PrunedMlp,
    has_additions,
    hook_tables,
)
from gohsp.layers.frozen import FrozenBlock, FrozenBlocks, FrozenEmbedding, FrozenLinear
from gohsp.layers.norms import CompactNorm, norm_kind
from gohsp.layers.patches import PatchProjection, lies_side_by_side, project_patches
from gohsp.layers.plain import PlaceColumns, RaggedAttention, SelectColumns, plain_linear

__all__ = [
    "CompactLayerScale",
    "CompactLinear",
    "CompactNorm",
    "FrozenBlock",
    "FrozenBlocks",
    "FrozenEmbedding",
    "FrozenLinear",
    "PatchProjection",
    "PlaceColumns",
    "PrunedAttention",
    "PrunedBlock",
    "PrunedBlocks",
    "PrunedMlp",
    "RaggedAttention",
    "SelectColumns",
    "attend",
    "find_bare_blocks",
    "has_additions",
    "head_angles",
    "head_masks",
    "hook_tables",
    "lies_side_by_side",
    "norm_kind",
    "plain_linear",
    "project_patches",
]
