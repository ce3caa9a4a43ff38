# SPDX-License-Identifier: Apache-2.0
"""The build: pyproject.toml holds the metadata, CMakeLists.txt the native library; this file joins the two.

Environment variables
    GOHSP_NATIVE=OFF            no native library: a pure Python install with the reference and Triton backends
    GOHSP_CUDA=AUTO|ON|OFF      CUDA kernels: where nvcc is found and compiles them (default), required, left out
    GOHSP_CUDA_ARCHS=LIST       GPUs that they are compiled for, as CMake names them; by default those from 8.0 on that
                                nvcc knows
    GOHSP_WERROR=ON|OFF         whether a warning of nvcc ends the build; by default not
    GOHSP_CHECKS=ON|OFF         the pybind11 module that the tests use; by default only in builds inside the source tree
    MAX_JOBS=N                  parallel compile jobs; by default the number of cores
    CXX                         the C++ compiler, as CMake reads it
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.version import Version
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_TREE = ROOT / "build" / "native"  # one tree for every kind of build, so that each of them is incremental
# Built for what the package asks for at run time. CMakeLists.txt and tools/check_torch.py read the same line.
OLDEST_TORCH = Version(re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0])
CUDA_LEFT_OUT = """
gohsp: WARNING: the CUDA kernels did not compile and are LEFT OUT; the first error stands above.
gohsp: The rest is built. On a GPU the backends 'triton' and 'reference' remain.
gohsp: GOHSP_CUDA=ON makes this an error, GOHSP_CUDA=OFF does not try.
"""


def switch(name: str, default: str, allowed: tuple[str, ...] = ("ON", "OFF")) -> str:
    """Value of an environment switch, upper case; anything that is not `allowed` ends the build."""
    value = os.environ.get(name, default).upper()
    if value not in allowed:
        sys.exit(f"gohsp: {name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def installed_tool(name: str) -> str | None:
    """Path of a program that the distribution of its own name brought, wherever this Python finds that; or None."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if file.parts[-2:] == ("bin", name))
    return next((str(path) for path in found if path.is_file()), None)


def find_tool(name: str) -> str:
    """Path of a build tool that pip installs, looked for among the packages that this Python sees, then on PATH."""
    path = installed_tool(name) or shutil.which(name)
    if path is None:
        sys.exit(f"gohsp: the native build needs {name}, which was not found. Install it: pip install {name}")
    return path


def require_torch() -> None:
    """End the build unless a torch with the stable ABI of `OLDEST_TORCH` can be imported by this Python."""
    how = (
        "Install torch first, then build without isolation so that the build sees it:\n"
        f"    pip install 'torch>={OLDEST_TORCH}' torchvision\n"
        "    pip install --no-build-isolation ."
    )
    try:
        found = Version(importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"gohsp: the native library is built against torch, and this Python has none.\n{how}")
    if found < OLDEST_TORCH:
        sys.exit(f"gohsp: the native library needs torch {OLDEST_TORCH} or newer; this Python has {found}.\n{how}")


def require_compiler() -> None:
    """End the build, naming the way out, where there is no C++ compiler."""
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in named or ("c++", "g++", "clang++", "cl")):
        looked = f"CXX={named[0]}" if named else "c++, g++, clang++"
        sys.exit(
            f"gohsp: no C++ compiler was found (looked for {looked}).\n"
            "Install one (Debian and Ubuntu: apt-get install g++), or install without the native library:\n"
            "    GOHSP_NATIVE=OFF pip install --no-build-isolation ."
        )


def run(*commands: list[str]) -> int:
    """Run the commands one after another; returns the exit status of the first that fails, or 0."""
    for command in commands:
        print("gohsp:", " ".join(command), flush=True)
        if code := subprocess.run(command).returncode:
            return code
    return 0


class BuildNative(build_ext):
    """Runs CMake, and lets it install the libraries straight into the gohsp_kernels package."""

    def run(self) -> None:
        require_torch()
        require_compiler()
        cmake = find_tool("cmake")
        package = ROOT / "gohsp_kernels" if self.inplace else Path(self.build_lib).resolve() / "gohsp_kernels"
        cuda = switch("GOHSP_CUDA", "AUTO", ("AUTO", "ON", "OFF"))
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD_TREE), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGOHSP_CUDA={cuda}",
            f"-DGOHSP_CUDA_ARCHS={os.environ.get('GOHSP_CUDA_ARCHS', '')}",
            f"-DGOHSP_WERROR={switch('GOHSP_WERROR', 'OFF')}",
            f"-DGOHSP_CHECKS={switch('GOHSP_CHECKS', 'ON' if self.inplace else 'OFF')}",
        ]
        build = [
            cmake,
            "--build",
            str(BUILD_TREE),
            "--parallel",
            os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1),
        ]
        install = [cmake, "--install", str(BUILD_TREE), "--prefix", str(package), "--component"]
        if code := run(configure, [*build, "--target", "cpu_part"], [*install, "python"]):
            sys.exit(f"gohsp: the native build failed (exit {code}); the first error stands above this line")
        if code := run(build, [*install, "cuda"]):
            if cuda != "AUTO":
                sys.exit(f"gohsp: the build of the CUDA kernels failed (exit {code}); the first error stands above")
            (package / "_C_cuda.so").unlink(missing_ok=True)  # one of an earlier build would not fit the rest
            print(CUDA_LEFT_OUT, file=sys.stderr, flush=True)

    # CMake knows what it installs; setuptools must not look for a file named after the placeholder extension.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the operators use no Python C API, so one binary serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


native = switch("GOHSP_NATIVE", "ON") == "ON"
setup(
    packages=find_packages(include=["gohsp_kernels*"]) + find_packages("python"),
    package_dir={"": "python", "gohsp_kernels": "gohsp_kernels"},
    ext_modules=[Extension("gohsp_kernels._native", sources=[])] if native else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
