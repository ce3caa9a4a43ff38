# SPDX-License-Identifier: Apache-2.0
"""How long the attack is: once in each run of the tests, twenty times in ``make attack``."""

from __future__ import annotations

import os

TIMES = int(os.environ.get("GOHSP_ATTACK", "1"))
