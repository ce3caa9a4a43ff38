# SPDX-License-Identifier: Apache-2.0
"""The commands from their arguments to the CSV file, on a tiny model and with contenders that need only torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import gohsp_kernels as gk
from bench import cli
from bench.cli import app, spread
from bench.harness import contenders, results
from bench.harness.contenders import Contender
from bench.routines import operators, roofline
from bench.routines.operators import Attention, Linear

from .conftest import TINY, make_row

IN_TORCH = ["dense", "masked", "sliced", "gohsp-reference"]
OURS = ["gohsp"] if gk.can_run("cpu") else []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "results.csv"


def _bench(*arguments: object, out: Path | None = None, fails: bool = False) -> Result:
    where = [] if out is None else ["--out", str(out), "--threads", "1", "--rounds", "2"]
    result = CliRunner().invoke(app, [*map(str, arguments), *where])
    if not fails and result.exception:
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("given", "spread_out"),
    [
        ("--batch 1 8 --rounds 3", "--batch 1 --batch 8 --rounds 3"),
        ("--batch 1 --batch 8", "--batch 1 --batch 8"),
        ("--batch 1 8 32 --batch 64", "--batch 1 --batch 8 --batch 32 --batch 64"),
        ("--rounds 3 4", "--rounds 3 4"),
        ("--batch=1 8", "--batch=1 8"),
        ("--backend-list --batch 1 8", "--backend-list --batch 1 --batch 8"),
        ("", ""),
    ],
)
def test_further_values_of_a_repeatable_option_get_its_name(given: str, spread_out: str) -> None:
    assert spread(given.split(), {"--batch"}) == spread_out.split()


def test_end_to_end_takes_several_batches_presets_and_contenders(out: Path) -> None:
    arguments = ["--model", TINY, "--preset", "2x300", "ragged", "--batch", 1, 2, "--contenders", *IN_TORCH]
    result = _bench("end-to-end", *arguments, out=out)
    assert result.exit_code == 0
    rows = results.read(out)
    timed = {(row.case, row.batch, row.contender) for row in rows if row.metric == "time"}
    cases = (f"{TINY}/2x300", f"{TINY}/ragged")
    assert timed == {(case, batch, name) for case in cases for batch in (1, 2) for name in IN_TORCH}
    times = [row for row in rows if row.metric == "time"]
    assert all(row.value > 0 and (row.tokens, row.threads, row.rounds) == (5, 1, 2) for row in times)
    assert all(f"{case}: " in result.output and "MACs" in result.output for case in cases)


def test_a_second_run_replaces_the_first(out: Path) -> None:
    arguments = ["--model", TINY, "--preset", "ragged", "--batch", 1, "--contenders", "masked", "sliced"]
    _bench("end-to-end", *arguments, out=out)
    first = results.read(out)
    _bench("end-to-end", *arguments, out=out)
    assert [row.key for row in results.read(out)] == [row.key for row in first]


def test_ratios_are_to_gohsp(out: Path) -> None:
    if not OURS:
        pytest.skip(gk.can_run("cpu").reason)
    _bench(
        "end-to-end", "--model", TINY, "--preset", "ragged", "--batch", 1, "--contenders", "sliced", "gohsp", out=out
    )
    ratios = {row.contender: row.value for row in results.read(out) if row.metric == "ratio"}
    assert ratios["gohsp"] == 1.0 and ratios["sliced"] > 0


def test_a_wrong_contender_is_refused_and_the_command_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheat = Contender(lambda job: lambda x: torch.zeros(x.shape[0], 10))
    monkeypatch.setitem(contenders.CONTENDERS, "sliced", cheat)
    for routine in ("end-to-end", "contention"):
        arguments = ["--model", TINY, "--preset", "ragged", "--batch", 1, "--contenders", "masked", "sliced"]
        result = _bench(routine, *arguments, out=out, fails=True)
        assert result.exit_code == 1
        assert "refused for a wrong result: sliced" in result.output
    assert {row.contender for row in results.read(out)} == {"masked"}


def test_contention_shows_what_a_busy_core_does(out: Path) -> None:
    arguments = ["--model", TINY, "--preset", "ragged", "--batch", 1, "--contenders", "masked", "sliced"]
    result = _bench("contention", *arguments, out=out)
    assert "another process spinning on core" in result.output
    rows = {(row.contender, row.metric): row.value for row in results.read(out)}
    assert {*rows} == {(name, metric) for name in ("masked", "sliced") for metric in ("quiet", "busy", "growth")}
    for name in ("masked", "sliced"):
        assert rows[name, "growth"] == pytest.approx(rows[name, "busy"] / rows[name, "quiet"], rel=1e-3)


def test_sublayers_compares_both_kinds(out: Path) -> None:
    _bench("sublayers", "--model", TINY, "--preset", "2x300", "ragged", "--batch", 1, 2, out=out)
    timed = {(row.case, row.part, row.batch, row.contender) for row in results.read(out) if row.metric == "time"}
    names = ["sliced", "gohsp-reference", *OURS]
    assert timed == {
        (f"{TINY}/{preset}", part, batch, name)
        for preset in ("2x300", "ragged")
        for part in ("attention", "mlp")
        for batch in (1, 2)
        for name in names
    }


def test_kernels_runs_its_shapes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (Linear(1, 5, 24, 7, 33, 20, "gelu"), Attention(2, 9, (0, 3), (4, 1), num_queries=2))
    monkeypatch.setattr(operators, "CASES", shapes)
    assert _bench("kernels", out=out).exit_code == 0
    timed = {(row.part, row.case, row.contender) for row in results.read(out) if row.metric == "time"}
    labels = [("packed_linear", "7/24 to 20/33 gelu"), ("ragged_attention", "qk 0+3 v 4+1 2 queries")]
    assert timed == {(*label, name) for label in labels for name in ("torch", "gohsp-reference", *OURS)}


@pytest.mark.skipif(not OURS, reason=gk.can_run("cpu").reason)
def test_roofline_prints_limits_and_stages(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "GEMM_SIZE", 64)
    monkeypatch.setattr(roofline, "COPY_FLOATS", 1 << 12)
    result = _bench("roofline", "--model", TINY, "--preset", "ragged", "--batch", 1, 2, out=out)
    assert "of limit" in result.output and "softmax and the rest" in result.output
    assert {row.part for row in results.read(out)} == {"machine", "attention", "mlp", "encoder"}


def test_plot_draws_from_the_csv_alone(out: Path) -> None:
    results.append(out, [make_row(), make_row(contender="sliced", value=47.0, p80=50.0)])
    result = _bench("plot", "--from", out)
    chart = out.parent / "end-to-end.svg"
    assert "wrote" in result.output
    assert chart.read_text().lstrip().startswith("<?xml")


def test_plot_takes_another_directory(out: Path, tmp_path: Path) -> None:
    results.append(out, [make_row()])
    _bench("plot", "--from", out, "--out", tmp_path / "docs" / "images")
    assert (tmp_path / "docs" / "images" / "end-to-end.svg").exists()


def test_backend_list_tells_who_can_run_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "why_not", lambda name: "was not built" if name == "gohsp" else "")
    result = _bench("end-to-end", "--backend-list")
    lines = {line.split()[1]: line for line in result.output.splitlines() if line.startswith("│")}
    assert {*lines} == {*contenders.CONTENDERS}
    assert "no: was not built" in lines["gohsp"]
    assert "yes" in lines["dense"] and "2." in lines["dense"]


@pytest.mark.parametrize(
    "arguments", [("--batch", 0), ("--threads", 0), ("--rounds", 0), ("--batch", "many"), ("--unknown", 1)]
)
def test_bad_arguments_are_refused(arguments: tuple[object, ...]) -> None:
    assert _bench("end-to-end", *arguments, fails=True).exit_code == 2


@pytest.mark.parametrize("options", [("--preset", "sparse"), ("--contenders", "tvm")])
def test_unknown_names_are_refused_with_the_known_ones(options: tuple[str, str], out: Path) -> None:
    arguments = ["--model", TINY, "--preset", "ragged", "--batch", 1, *options]
    result = _bench("end-to-end", *arguments, out=out, fails=True)
    assert isinstance(result.exception, ValueError)
    assert f"{options[0].strip('-')}" in str(result.exception) and options[1] in str(result.exception)


def test_all_routines_are_there() -> None:
    output = _bench("--help").output
    for routine in ("end-to-end", "sublayers", "kernels", "roofline", "contention", "plot"):
        assert routine in output


def test_one_thread_a_core_is_the_default() -> None:
    assert cli.THREADS >= 1
