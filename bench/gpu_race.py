# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu_race``: see :mod:`bench.gpu.race`."""

from bench.gpu.race import main

if __name__ == "__main__":
    raise SystemExit(main())
