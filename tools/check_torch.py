# SPDX-License-Identifier: Apache-2.0
"""Exits 0 where this Python has the torch that pyproject.toml asks for and a torchvision that loads beside it."""

import re
import sys
from pathlib import Path

try:
    import torch

    # A torchvision built for another torch fails only when its operators are looked up, which this import does.
    import torchvision.ops
except (ImportError, RuntimeError) as error:
    sys.exit(f"{type(error).__name__}: {error}")

project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
oldest = re.findall(r'"torch>=([\d.]+)"', project)[0]
if [*map(int, torch.__version__.split("+")[0].split(".")[:2])] < [*map(int, oldest.split("."))]:
    sys.exit(f"torch {torch.__version__} is older than {oldest}")
print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
