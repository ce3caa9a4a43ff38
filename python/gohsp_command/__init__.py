# SPDX-License-Identifier: Apache-2.0
"""The program ``gohsp``: the command line, outside of the library so that its help does not wait for torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = b"gohsp: interrupted\n"


def main() -> None:
    """Import the command line and run it."""
    with ending_at_once():
        from gohsp_command.cli import app
    app()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process with one line while the block imports modules.

    It is not by an exception, which modules on their way in catch, or tell with tracebacks. Nothing is written yet.
    """
    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    if not ours or before is not signal.default_int_handler:  # not where the signal is ignored
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: Any) -> None:
    os.write(2, INTERRUPTED)
    os._exit(128 + number)
