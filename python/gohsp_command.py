# SPDX-License-Identifier: Apache-2.0
"""The program ``gohsp``: the command line, and one line for Ctrl-C in the seconds in which torch is imported."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = b"gohsp: interrupted\n"


def main() -> None:
    """Import the command line and run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where the signal is ignored
        signal.signal(signal.SIGINT, _end)
    from gohsp.cli import app

    signal.signal(signal.SIGINT, before)
    app()


def _end(number: int, frame: Any) -> None:
    # Not by an exception, which modules on their way in catch, or tell with tracebacks. Nothing is written yet.
    os.write(2, INTERRUPTED)
    os._exit(128 + number)
