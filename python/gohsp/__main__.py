# SPDX-License-Identifier: Apache-2.0
"""``python -m gohsp``: the command line, in the form that ``accelerate launch --module`` needs."""

from gohsp_command.cli import app

app(prog_name="gohsp")
