# SPDX-License-Identifier: Apache-2.0
from bench.cli import app

app(prog_name="python -m bench")
