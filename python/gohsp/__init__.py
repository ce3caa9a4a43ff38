# SPDX-License-Identifier: Apache-2.0
"""gohsp: heterogeneous pruning of vision transformers, and the result on kernels that are made for it."""

from importlib.metadata import PackageNotFoundError, version

import gohsp.models.timm_eva
import gohsp.models.timm_hiera
import gohsp.models.timm_hieradet
import gohsp.models.timm_maps
import gohsp.models.timm_maxvit
import gohsp.models.timm_nest
import gohsp.models.timm_relpos
import gohsp.models.timm_swin
import gohsp.models.timm_swin_v2
import gohsp.models.timm_towers
import gohsp.models.timm_vit  # noqa: F401  registers the family
from gohsp.compress import accelerate, compress, compress_block, densify
from gohsp.count import count
from gohsp.expand import expand
from gohsp.freeze import freeze
from gohsp.keyframes import KeyframeModel
from gohsp.masks.mask import BlockMask, ModelMask
from gohsp.pruning.latency import LatencyTable
from gohsp.pruning.prune import PruneResult, prune
from gohsp.pruning.ranking import rank_heads
from gohsp.pruning.synthesis import synthesise
from gohsp.recipe import Admm, Distillation, Fit
from gohsp.serialization import load, save
from gohsp.training.train import TrainResult, train
from gohsp_kernels import GraphedModel

try:
    __version__ = version("gohsp")
except PackageNotFoundError:  # a checkout on the path that nobody installed
    __version__ = "0+source"

__all__ = [
    "Admm",
    "BlockMask",
    "Distillation",
    "Fit",
    "GraphedModel",
    "KeyframeModel",
    "LatencyTable",
    "ModelMask",
    "PruneResult",
    "TrainResult",
    "accelerate",
    "compress",
    "compress_block",
    "count",
    "densify",
    "expand",
    "freeze",
    "load",
    "prune",
    "rank_heads",
    "save",
    "synthesise",
    "train",
]
