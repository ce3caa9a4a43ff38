# SPDX-License-Identifier: Apache-2.0
"""The projection of patches, as one matrix product where that is faster than a convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PRODUCT_ON = "cuda"
"""Type of the device where patches are projected by a matrix product; PyTorch gives AMD's the same name."""


class PatchProjection(nn.Conv2d):
    """Convolution whose kernels lie side by side, as patches do. A GPU computes it as one matrix product.

    Because cuDNN is slow at it; docs/design.md says how slow. Made of an ``nn.Conv2d`` by changing its class, so that
    parameters, hooks and whatever else hangs on it stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, D, rows of patches, columns of patches] for images [B, C, height, width].

        On a GPU the result is a view whose channels lie side by side, as tokens have them.

        Raises:
            RuntimeError: The image is smaller than a patch, or has other channels or another dtype than the weight.
        """
        # Asked at each call, because code that wants denser features sets another stride on the finished model; and of
        # the image, because asking a weight that is computed would compute it once more.
        if x.device.type != PRODUCT_ON or not lies_side_by_side(self):
            return super().forward(x)
        return project_patches(x, self.weight, self.bias)

    def _get_name(self) -> str:
        # Printed as what it computes: gohsp.save compares printed models, and timm's set_input_size puts a plain
        # convolution in its place.
        return nn.Conv2d.__name__


def project_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of an image with kernels that are laid side by side, as one product.

    What is left over at the right and at the bottom counts for nothing.

    Args:
        x: [..., C, height, width].
        weight: [D, C, p, q].
        bias: [D] or None.

    Returns:
        [..., D, height // p, width // q], with the strides of [..., height // p, width // q, D].

    Raises:
        RuntimeError: The image is smaller than a patch, or its channels or dtype are not those of the weight.
    """
    height, width = weight.shape[2:]
    patches = x.unfold(-2, height, height).unfold(-2, width, width)  # [..., C, rows, columns, p, q], a view
    return F.linear(patches.movedim(-5, -3).flatten(-3), weight.flatten(1), bias).movedim(-1, -3)


def lies_side_by_side(conv: nn.Conv2d) -> bool:
    """Return whether the kernels of a convolution neither overlap, nor leave gaps, nor reach beyond the image."""
    return (conv.stride, conv.padding, conv.dilation, conv.groups) == (conv.kernel_size, (0, 0), (1, 1), 1)
