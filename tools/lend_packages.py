# SPDX-License-Identifier: Apache-2.0
"""Lets the virtual environment VENV see the packages of this Python where that is itself a virtual environment.

    python3 tools/lend_packages.py VENV

`python3 -m venv --system-site-packages` lends the packages of the Python under all environments, and so not those of
an environment that it is called from. What VENV holds itself goes first.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

WHERE = "import sysconfig; print(sysconfig.get_path('purelib'))"

if sys.prefix != sys.base_prefix:
    own = subprocess.run([f"{sys.argv[1]}/bin/python", "-c", WHERE], capture_output=True, text=True, check=True)
    lent = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in dict.fromkeys(lent)]
    Path(own.stdout.strip(), "lent_packages.pth").write_text("".join(lines))
