# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Activations inside the kernels, and their derivatives. The names and meanings are those of the reference."""

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    """``NAME`` applied to a float32 block."""
    if NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 1 + tanh(z) is 2 sigmoid(2 z), which needs no tanh of the vendor's library.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(NAME == "identity")
    return x


@triton.jit
def activation_slope(x, NAME: tl.constexpr):
    """Derivative of ``NAME`` at a float32 block of its inputs."""
    if NAME == "gelu":
        slope = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "silu":
        s = tl.sigmoid(x)
        slope = s + x * s * (1.0 - s)
    elif NAME == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        slope = s + 1.702 * x * s * (1.0 - s)
    else:
        tl.static_assert(NAME == "identity")
        slope = x * 0.0 + 1.0
    return slope
