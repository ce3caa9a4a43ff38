# SPDX-License-Identifier: Apache-2.0
"""The build: setup.py says clearly what is missing, and the wheels hold what they should."""

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE_STUB = """
cmake_minimum_required(VERSION 3.22)
project(stub LANGUAGES CXX)
file(WRITE ${CMAKE_BINARY_DIR}/stub.cpp "extern \\"C\\" int stub() { return 1; }")
add_library(_C_cpu MODULE ${CMAKE_BINARY_DIR}/stub.cpp)
set_target_properties(_C_cpu PROPERTIES PREFIX "" SUFFIX ".so")
install(TARGETS _C_cpu LIBRARY DESTINATION . COMPONENT python)
add_custom_target(cpu_part DEPENDS _C_cpu)
file(WRITE ${CMAKE_BINARY_DIR}/switches "${GOHSP_CUDA} ${GOHSP_CHECKS} ${CMAKE_BUILD_TYPE} ${Python_EXECUTABLE}")
"""


@pytest.fixture
def script(monkeypatch):
    """The names that setup.py defines, with the call of setup() recorded as `call` instead of made."""
    call = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: call.update(arguments))
    monkeypatch.chdir(ROOT)

    def read():
        return runpy.run_path(str(ROOT / "setup.py")) | {"call": call}

    return read


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, with a CMakeLists.txt that builds one small library."""
    copy = tmp_path / "tree"
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("python", "gohsp_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    (copy / "README.md").write_text("a copy\n")
    (copy / "CMakeLists.txt").write_text(CMAKE_STUB)
    return copy


def build_wheel(tree, **environment):
    """Build a wheel of the tree; returns the finished process and the wheel's path, if there is one."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)
    return done, next((tree / "dist").glob("*.whl"), None)


def python_files(root, package):
    return {f"{package}/{file.relative_to(root).as_posix()}" for file in root.rglob("*.py")}


def test_setup_is_read_without_torch():
    block = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read())"
    done = subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {block}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip().splitlines()[-1] == "gohsp", done.stderr


def test_packages_and_extension(script):
    call = script()["call"]
    assert {"gohsp", "gohsp.demo", "gohsp_kernels"} <= set(call["packages"])
    assert not {"bench", "tests"} & set(call["packages"])
    assert [extension.name for extension in call["ext_modules"]] == ["gohsp_kernels._native"]


def test_native_part_can_be_left_out(script, monkeypatch):
    monkeypatch.setenv("GOHSP_NATIVE", "off")
    assert script()["call"]["ext_modules"] == []


def test_unknown_value_of_a_switch_names_the_choices(script, monkeypatch):
    monkeypatch.setenv("GOHSP_NATIVE", "maybe")
    with pytest.raises(SystemExit, match="GOHSP_NATIVE must be one of ON, OFF; got 'MAYBE'"):
        script()


def test_missing_torch_names_both_commands(script, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    require = script()["require_torch"]
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit, match=r"this Python has none(.|\n)*pip install 'torch>=2.10'(.|\n)*--no-build-iso"):
        require()


@pytest.mark.parametrize(("version", "good"), [("2.9.1", False), ("2.10.0", True), ("2.14.1+cu130", True)])
def test_torch_versions_are_compared_as_numbers(script, monkeypatch, version, good):
    require = script()["require_torch"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if good:
        require()
    else:
        with pytest.raises(SystemExit, match=r"needs torch 2\.10 or newer; this Python has 2\.9\.1"):
            require()


@pytest.mark.parametrize(
    ("compiler", "looked"), [(None, r"c\+\+, g\+\+, clang\+\+"), ("ccache-none g++", "CXX=ccache")]
)
def test_missing_compiler_names_the_way_out(script, monkeypatch, tmp_path, compiler, looked):
    require = script()["require_compiler"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    with pytest.raises(SystemExit, match=rf"no C\+\+ compiler was found \(looked for {looked}(.|\n)*GOHSP_NATIVE=OFF"):
        require()


def test_missing_tool_names_the_command(script):
    with pytest.raises(SystemExit, match=r"needs gohsp-no-tool(.|\n)*pip install gohsp-no-tool"):
        script()["find_tool"]("gohsp-no-tool")


def test_a_tool_is_found_wherever_its_package_is(script, monkeypatch, tmp_path):
    """As that of an environment whose packages are lent to this one, and whose folder of programs is not on PATH."""
    packages = tmp_path / "packages" / "gohsp_tool-1.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: gohsp-tool\nVersion: 1\n")
    (packages / "RECORD").write_text("../bin/gohsp-tool,,\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gohsp-tool").touch()
    monkeypatch.syspath_prepend(str(packages.parent))
    assert script()["find_tool"]("gohsp-tool") == str(tmp_path / "bin" / "gohsp-tool")
    (tmp_path / "bin" / "gohsp-tool").unlink()
    with pytest.raises(SystemExit, match="pip install gohsp-tool"):
        script()["find_tool"]("gohsp-tool")


def test_pure_wheel_holds_both_packages(tree):
    done, wheel = build_wheel(tree, GOHSP_NATIVE="OFF")
    assert wheel is not None, done.stdout + done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert python_files(ROOT / "python" / "gohsp", "gohsp") <= names
    assert python_files(ROOT / "gohsp_kernels", "gohsp_kernels") <= names
    assert {"gohsp/py.typed", "gohsp_kernels/py.typed", "gohsp/demo/report.html.j2"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith(".so") or name.startswith(("tests", "bench")) for name in names)


def test_native_wheel_serves_every_python_of_the_platform(tree):
    done, wheel = build_wheel(tree, GOHSP_CUDA="off", GOHSP_NATIVE="ON")
    assert wheel is not None, done.stdout + done.stderr
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["gohsp_kernels/_C_cpu.so"]
    switches = (tree / "build" / "native" / "switches").read_text()
    assert switches == f"OFF OFF Release {sys.executable}"


def test_build_in_place_is_incremental_and_has_the_checks(tree):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    first, second = (subprocess.run(command, cwd=tree, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr + second.stderr
    assert (tree / "gohsp_kernels" / "_C_cpu.so").is_file()
    assert " ON Release" in (tree / "build" / "native" / "switches").read_text()


STUB_OF_CUDA = """
file(WRITE ${CMAKE_BINARY_DIR}/cuda.cpp "kernels that no compiler takes")
add_library(_C_cuda MODULE ${CMAKE_BINARY_DIR}/cuda.cpp)
set_target_properties(_C_cuda PROPERTIES PREFIX "" SUFFIX ".so")
install(TARGETS _C_cuda LIBRARY DESTINATION . COMPONENT cuda)
"""


@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_cuda_kernels_that_do_not_compile(tree, wanted):
    (tree / "CMakeLists.txt").write_text(CMAKE_STUB + STUB_OF_CUDA)
    stale = tree / "gohsp_kernels" / "_C_cuda.so"
    stale.write_text("of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"GOHSP_CUDA": wanted}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert (tree / "gohsp_kernels" / "_C_cpu.so").is_file()
    assert "cuda.cpp" in done.stdout + done.stderr  # the compiler's own words
    if wanted == "AUTO":
        assert done.returncode == 0 and "LEFT OUT" in done.stderr
        assert not stale.exists()
    else:
        assert done.returncode != 0 and "the build of the CUDA kernels failed" in done.stderr


def test_cuda_kernels_that_compile_are_installed(tree):
    good = STUB_OF_CUDA.replace("kernels that no compiler takes", "int kernels;")
    (tree / "CMakeLists.txt").write_text(CMAKE_STUB + good)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0 and "LEFT OUT" not in done.stderr
    assert (tree / "gohsp_kernels" / "_C_cuda.so").is_file()


def test_failing_build_points_at_the_first_error(tree):
    (tree / "CMakeLists.txt").write_text('message(FATAL_ERROR "no way")\n')
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no way" in done.stderr and "the native build failed" in done.stderr


def test_makefile_installs_the_build_tools_of_pyproject():
    tomllib = pytest.importorskip("tomllib")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    database = subprocess.run(["make", "-pn", "clean"], cwd=ROOT, capture_output=True, text=True).stdout
    line = next(line for line in database.splitlines() if line.startswith("BUILD_TOOLS :="))
    assert line == "BUILD_TOOLS := " + " ".join(f'"{tool}"' for tool in wanted)


@pytest.fixture
def lender(tmp_path):
    """A virtual environment with a stand-in of torch and torchvision, and one of its folders named in a .pth file."""
    parent = tmp_path / "parent"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(parent)], check=True)
    python = parent / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    for name in ("torch", "torchvision", "torchvision/ops"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("__version__ = '2.11.0'\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "linked_package.py").touch()
    (packages / "linked.pth").write_text(f"{tmp_path / 'linked'}\n")
    return python


def test_environment_of_make_sees_the_packages_of_the_one_it_is_made_from(tmp_path, lender):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    command = ["make", "-C", str(tmp_path), ".venv/.stamps/torch", f"PYTHON={lender}"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import torch, linked_package; print(torch.__file__)"
    python = tmp_path / ".venv" / "bin" / "python"
    shown = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
    assert shown.stdout.startswith(str(lender.parents[1])), shown.stderr
    # What the new environment holds itself goes first.
    own = next((tmp_path / ".venv" / "lib").glob("python*/site-packages"))
    (own / "torch.py").touch()
    shown = subprocess.run([python, "-c", "import torch; print(torch.__file__)"], capture_output=True, text=True)
    assert shown.stdout.strip() == str(own / "torch.py")


def test_continuous_integration_runs_lint_and_tests():
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make lint" in text and "make test" in text and "set -euo pipefail" in text
    assert "export GOHSP_WERROR=ON" in text
