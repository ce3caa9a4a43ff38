# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import gohsp_kernels as gk
from bench.harness import compare, contenders, results
from bench.harness.cases import Workload
from bench.harness.contenders import CONTENDERS, Contender, Job, Unavailable
from bench.harness.environment import Settings
from gohsp_kernels.formats import FORMATS

from ..conftest import printed

IN_TORCH = ["dense", "masked", "sliced", "gohsp-reference"]


def _errors(names: list[str], work: Workload, settings: Settings, batch: int = 3) -> dict[str, float]:
    with contenders.ready(names, work, work.images(batch), settings) as ready:
        return compare.check(ready)


@pytest.mark.parametrize("kind", ["ragged_work", "uniform_work"])
def test_contenders_in_torch_compute_what_float64_does(
    kind: str, settings: Settings, request: pytest.FixtureRequest
) -> None:
    errors = _errors(IN_TORCH, request.getfixturevalue(kind), settings)
    assert list(errors) == IN_TORCH
    assert max(errors.values()) < compare.TOLERANCE
    assert printed(settings) == ""


@pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)
@pytest.mark.parametrize("kind", ["ragged_work", "uniform_work"])
def test_gohsp_computes_what_float64_does(kind: str, settings: Settings, request: pytest.FixtureRequest) -> None:
    errors = _errors(["gohsp"], request.getfixturevalue(kind), settings)
    assert errors["gohsp"] < compare.TOLERANCE


@pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)
def test_int8_is_checked_with_its_own_tolerance_and_stored_as_int8(ragged_work: Workload, settings: Settings) -> None:
    with contenders.ready(["gohsp", "gohsp-int8"], ragged_work, ragged_work.images(2), settings) as (fp32, int8):
        error = compare.relative_error(int8.run(), int8.expected)
        assert compare.TOLERANCE < error < FORMATS["int8"].tolerance
        assert compare.agreeing([int8], {"gohsp-int8": error}) == [int8]
        assert compare.agreeing([fp32], {"gohsp": error}) == []
        compare.compare(compare.Place("end-to-end", "vit/ragged", "model", 2, 5), [fp32, int8], settings)
    assert {row.contender: row.dtype for row in results.read(settings.out)} == {
        "gohsp": "float32",
        "gohsp-int8": "int8",
    }


@pytest.mark.skipif(not gk.can_run("cpu", weights="bfloat16"), reason=gk.can_run("cpu", weights="bfloat16").reason)
def test_bf16_is_checked_with_its_own_tolerance(ragged_work: Workload, settings: Settings) -> None:
    with contenders.ready(["gohsp-bf16"], ragged_work, ragged_work.images(2), settings) as (bf16,):
        assert bf16.dtype == "bfloat16"
        assert compare.TOLERANCE < compare.relative_error(bf16.run(), bf16.expected) < FORMATS["bfloat16"].tolerance / 2


def test_gohsp_bf16_is_left_out_with_the_reason_where_there_are_no_tiles(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gk, "can_run", lambda backend, weights: gk.Support(False, f"{weights}: no tiles"))
    assert _errors(["gohsp-bf16"], ragged_work, settings) == {}
    assert "left out: gohsp-bf16: bfloat16: no tiles" in printed(settings)
    assert contenders.why_not("gohsp-bf16") == "bfloat16: no tiles"


def test_compile_bf16_computes_in_bfloat16(ragged_work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    images = ragged_work.images(1)
    assert CONTENDERS["compile-bf16"].build(Job(ragged_work, images, 1, Path()))(images).dtype == torch.bfloat16


def test_dense_and_pruned_models_are_checked_each_against_its_own(ragged_work: Workload, settings: Settings) -> None:
    with contenders.ready(["dense", "masked"], ragged_work, ragged_work.images(2), settings) as ready:
        dense, masked = ready
        assert compare.relative_error(dense.run(), masked.expected) > 0.1


def test_float64_covers_every_image_of_a_large_batch(ragged_work: Workload, settings: Settings) -> None:
    batch = 2 * contenders.REFERENCE_CHUNK + 1
    with contenders.ready(["masked"], ragged_work, ragged_work.images(batch), settings) as (masked,):
        assert masked.expected.shape == (batch, 10)
        assert masked.expected.dtype == torch.float64
        assert compare.relative_error(masked.run(), masked.expected) < compare.TOLERANCE


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_compute_what_float64_does(name: str, ragged_work: Workload, settings: Settings) -> None:
    for module in contenders._MODULES[name]:
        pytest.importorskip(module)
    assert _errors([name], ragged_work, settings)[name] < compare.TOLERANCE


def test_openvino_gets_the_threads_full_precision_and_one_stream(
    ragged_work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "openvino", mock.MagicMock(Core=lambda: core))
    monkeypatch.setattr(contenders, "_onnx_file", lambda job: tmp_path / "sliced.onnx")
    contenders._openvino(Job(ragged_work, ragged_work.images(1), 3, tmp_path))
    (model, device, config), _ = core.compile_model.call_args
    assert (model, device) == (tmp_path / "sliced.onnx", "CPU")
    assert config["INFERENCE_NUM_THREADS"] == 3
    assert config["INFERENCE_PRECISION_HINT"] == "f32"
    CONTENDERS["openvino-bf16"].build(Job(ragged_work, ragged_work.images(1), 3, tmp_path))
    assert core.compile_model.call_args.args[2] == {**config, "INFERENCE_PRECISION_HINT": "bf16"}
    assert (config["NUM_STREAMS"], config["PERFORMANCE_HINT"]) == (1, "LATENCY")


def test_onnxruntime_gets_the_threads_and_stops_spinning_after_a_run(
    ragged_work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setattr(contenders, "_onnx_file", lambda job: tmp_path / "sliced.onnx")
    contenders._onnxruntime(Job(ragged_work, ragged_work.images(1), 3, tmp_path))
    options = runtime.SessionOptions.return_value
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    options.add_session_config_entry.assert_called_once_with("session.force_spinning_stop", "1")
    assert runtime.InferenceSession.call_args.kwargs["providers"] == ["CPUExecutionProvider"]


@pytest.mark.parametrize(("name", "options"), [("compile", {}), ("compile-freezing", {"freezing": True})])
def test_torch_compile_gets_the_whole_sliced_model_and_static_shapes(
    name: str, options: dict[str, bool], ragged_work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_model = mock.Mock(side_effect=lambda model, **settings: model)
    monkeypatch.setattr(torch, "compile", compile_model)
    CONTENDERS[name].build(Job(ragged_work, ragged_work.images(1), 1, Path()))
    compile_model.assert_called_once_with(ragged_work.sliced, fullgraph=True, dynamic=False, options=options)


def test_compiled_code_of_earlier_inputs_is_dropped(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = mock.Mock()
    monkeypatch.setattr(torch.compiler, "reset", reset)
    for batch in (1, 2):
        _errors(["masked"], ragged_work, settings, batch)
    assert reset.call_count == 2


def test_torch_pruning_prunes_to_the_same_function(uniform_work: Workload, settings: Settings) -> None:
    pytest.importorskip("torch_pruning")
    with contenders.ready(["torch-pruning"], uniform_work, uniform_work.images(2), settings) as (contender,):
        assert compare.relative_error(contender.run(), contender.expected) < compare.TOLERANCE


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_torch_pruning_makes_a_smaller_model_and_leaves_the_dense_one_alone(uniform_work: Workload) -> None:
    pytest.importorskip("torch_pruning")
    before = sum(p.numel() for p in uniform_work.dense.parameters())
    job = Job(uniform_work, uniform_work.images(1), 1, Path())
    forward = contenders._torch_pruning(job)
    (model,) = (cell.cell_contents for cell in forward.__closure__ or ())  # type: ignore[attr-defined]
    assert sum(p.numel() for p in model.parameters()) == uniform_work.count.params
    assert sum(p.numel() for p in uniform_work.dense.parameters()) == before


def test_torch_pruning_is_left_out_of_ragged_cases_with_the_reason(ragged_work: Workload, settings: Settings) -> None:
    assert _errors(["torch-pruning", "masked"], ragged_work, settings).keys() == {"masked"}
    assert "left out: torch-pruning: this mask is not the same number" in printed(settings)


def test_what_cannot_be_imported_is_left_out_with_the_reason(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert _errors(["openvino", "masked"], ragged_work, settings).keys() == {"masked"}
    assert "left out: openvino: " in printed(settings)
    assert "pip install '.[bench]' brings it" in printed(settings)
    assert "openvino" in contenders.why_not("openvino")


def test_optional_contenders_that_fail_are_left_out_with_the_first_line_of_the_reason(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job) -> contenders.Forward:
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setitem(CONTENDERS, "openvino", Contender(fail, optional=True))
    assert _errors(["openvino"], ragged_work, settings) == {}
    assert printed(settings) == "left out: openvino: RuntimeError: no such operator\n"


def test_our_own_failures_are_not_swallowed(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job) -> contenders.Forward:
        raise RuntimeError("a bug of ours")

    monkeypatch.setitem(CONTENDERS, "gohsp", Contender(fail))
    with (
        pytest.raises(RuntimeError, match="a bug of ours"),
        contenders.ready(["gohsp"], ragged_work, ragged_work.images(1), settings),
    ):
        pass


def test_gohsp_without_its_library_is_left_out_with_the_reason(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gk, "can_run", lambda backend, **_: gk.Support(False, "was not built"))
    assert _errors(["gohsp"], ragged_work, settings) == {}
    assert "left out: gohsp: was not built" in printed(settings)
    assert contenders.why_not("gohsp") == "was not built"


def test_unknown_contenders_are_refused_by_name(ragged_work: Workload, settings: Settings) -> None:
    with (
        pytest.raises(ValueError, match=r"contenders: wanted some of dense, .*; got tvm"),
        contenders.ready(["dense", "tvm"], ragged_work, ragged_work.images(1), settings),
    ):
        pass


def test_set_up_is_timed_and_includes_the_first_call(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []

    def build(job: Job) -> contenders.Forward:
        def run(x: Tensor) -> Tensor:
            calls.append(x)
            return x

        return run

    monkeypatch.setitem(CONTENDERS, "masked", dataclasses.replace(CONTENDERS["masked"], build=build))
    with contenders.ready(["masked"], ragged_work, ragged_work.images(1), settings) as (contender,):
        assert len(calls) == 1
        assert contender.setup_seconds > 0
        assert torch.equal(contender.run(), ragged_work.images(1))


def test_reference_contender_runs_on_the_reference_backend(
    ragged_work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    original = gk.use_backend
    monkeypatch.setattr(gk, "use_backend", lambda name: (used.append(name), original(name))[1])
    images = ragged_work.images(1)
    CONTENDERS["gohsp-reference"].build(Job(ragged_work, images, 1, Path()))(images)
    assert used == ["reference"]


def test_results_need_no_autograd(ragged_work: Workload) -> None:
    images = ragged_work.images(1)
    for name in IN_TORCH:
        result = CONTENDERS[name].build(Job(ragged_work, images, 1, Path()))(images)
        assert not result.requires_grad and result.grad_fn is None


def test_exported_model_is_made_once(ragged_work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in contenders._EXPORTER:
        monkeypatch.setitem(sys.modules, module, torch)
    (tmp_path / "sliced.onnx").write_bytes(b"from the contender before")
    path = contenders._onnx_file(Job(ragged_work, ragged_work.images(1), 1, tmp_path))
    assert path.read_bytes() == b"from the contender before"


def test_modules_that_are_not_there_give_a_reason_that_says_how_to_get_them() -> None:
    with pytest.raises(Unavailable, match=r"no_such_module.*pip install"):
        contenders._import("no_such_module")
