# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu_check``, the command of ``make gpu-check``: see :mod:`bench.gpu.models_check`."""

from bench.gpu.models_check import main

if __name__ == "__main__":
    raise SystemExit(main())
