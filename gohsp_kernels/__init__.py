# SPDX-License-Identifier: Apache-2.0
"""Kernels that execute heterogeneously pruned transformer sublayers. Tensors in, tensors out; knows no model."""

from . import _flops, _native
from ._watchers import is_counted, is_rewritten
from .activations import ACTIVATIONS
from .chain import FrozenChain, SublayerChain
from .cpu import pack_embedding, pack_linear
from .dispatch import Support, backends, can_run, use_backend
from .graphed import GraphedModel
from .ops import attention_sublayer, mlp_sublayer, packed_linear, ragged_attention

# Operators of pickled and exported models are called without asking whether the library is there.
_native.load()
_flops.register()

__all__ = [
    "ACTIVATIONS",
    "FrozenChain",
    "GraphedModel",
    "SublayerChain",
    "Support",
    "attention_sublayer",
    "backends",
    "can_run",
    "is_counted",
    "is_rewritten",
    "mlp_sublayer",
    "pack_embedding",
    "pack_linear",
    "packed_linear",
    "ragged_attention",
    "use_backend",
]
