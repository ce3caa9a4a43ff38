# SPDX-License-Identifier: Apache-2.0
"""Exits 0 where this Python has a torch that serves (2.10 or newer) and a torchvision that loads beside it."""

import sys

try:
    import torch

    # A torchvision built for another torch fails only when its operators are looked up, which this import does.
    import torchvision.ops
except (ImportError, RuntimeError) as error:
    sys.exit(f"{type(error).__name__}: {error}")

if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 10):
    sys.exit(f"torch {torch.__version__} is older than 2.10")
print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
