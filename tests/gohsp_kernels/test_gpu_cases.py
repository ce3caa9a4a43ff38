# SPDX-License-Identifier: Apache-2.0
"""What the explicit cases of the GPU check reach on GPUs that are not there: every kernel, tile, form and way out.

The host code of both backends runs at full size and chooses as it would on the GPU. Launches are noted and do nothing,
and tensors are memory that nobody touches, so it takes a second.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gohsp_kernels import gpu_cases, gpu_check
from gohsp_kernels.descriptors import Linear
from gohsp_kernels.gpu_cases import Chain, explicit_cases, judge
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import Call, Maker

Reached = dict[str, set[str]]


def untouched(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Makers give memory as it comes, in the dtype that it is wanted in."""
    monkeypatch.setattr(Maker, "normal", lambda self, *shape: torch.empty(*shape, dtype=dtype))


def reached(monkeypatch: pytest.MonkeyPatch, major: int, processors: int, dtype: torch.dtype) -> Reached:
    """Forms by kernel, as csrc/cuda/launch.cuh names both; of linear layers the activation is one of the forms."""
    checks: Any = pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")
    untouched(monkeypatch, dtype)
    monkeypatch.setattr(BACKENDS["cuda"], "missing", lambda _: "")
    before = checks.pretend_capability(major), checks.pretend_processors(processors), checks.only_note(True)
    checks.reached()
    try:
        with torch.no_grad():
            for seed, draw in enumerate(explicit_cases().values()):
                draw(Maker(seed)).to(dtype).run("cuda")
    finally:
        for set_back, value in zip((checks.pretend_capability, checks.pretend_processors), before, strict=False):
            set_back(value)
        checks.only_note(before[2])
    found: Reached = defaultdict(set)
    for text in checks.reached():
        kernel, forms = text.split(" | ")
        kernel = re.search(r"kernel = (.*?); Params", kernel)[1].replace("gohsp::cuda::", "")  # type: ignore[index]
        kernel = re.sub(r"linear_kernel<(.*), (Finish::\w+)>", r"\1 \2", kernel)
        kernel, _, finish = kernel.partition(" Finish::")
        found[re.sub(r"\W+", " ", kernel).strip()].add(", ".join(filter(None, (finish, forms))))
    return dict(found)


IN, STATISTICS = ("rows", "chunks"), ("statistics left", "statistics read")
OUT = ("wide", "paired", "single", "scattered", "residual", "in place", "leaves statistics")
FINISH = ("identity", "gelu", "other")
LINEAR = (*IN, *STATISTICS, *OUT, *FINISH)
ATTENTION = ("aligned", "unaligned", "norms", "keys shared")
ROWS = ("aligned", "unaligned", "normalised", "columns")
# What stands beside what. A way out and an activation are chosen apart, and so are inputs and ways out.
PAIRS = [(a, s) for a in IN for s in STATISTICS] + [
    ("single", "residual"),
    ("scattered", "residual"),
    ("scattered", "in place"),
    ("wide", "in place"),
    ("in place", "leaves statistics"),
    ("residual", "leaves statistics"),
]


def words(forms: set[str]) -> set[str]:
    return {word for form in forms for word in form.split(", ")}


HOPPER = "WarpgroupTile {} 128 128 3 2", "WarpgroupTile {} 64 64 4 3", "LinearTile {} 32 32 1 1 8 16 2"
AMPERE = "LinearTile {} 128 128 4 2 1 4 2", "LinearTile {} 64 64 4 1 1 4 4", "LinearTile {} 32 32 1 1 8 16 2"


@pytest.mark.parametrize(
    ("major", "processors", "element", "tiles"),
    [(9, 132, "F16", HOPPER), (9, 132, "Bf16", HOPPER), (8, 108, "F16", AMPERE)],
)
def test_every_tile_form_and_way_out_of_16_bits(
    major: int, processors: int, element: str, tiles: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, name = {"F16": (torch.float16, "Half"), "Bf16": (torch.bfloat16, "Bfloat16")}[element]
    tiles = tuple(tile.format(element) for tile in tiles)
    found = reached(monkeypatch, major, processors, dtype)
    attention = [f"attention_kernel AttentionTile {element} {sizes}" for sizes in ("64 256 7 2", "128 128 8 1")]
    assert set(found) == {*tiles, *attention, f"rows_kernel {name}"}
    for tile in tiles:
        assert words(found[tile]) == set(LINEAR), tile
        for pair in PAIRS:
            assert any(set(pair) <= set(form.split(", ")) for form in found[tile]), (tile, pair)
    for kernel in attention:
        assert words(found[kernel]) == set(ATTENTION), kernel
        for aligned in ("aligned", "unaligned"):
            for norms in ("", "norms"):
                for shared in ("", "keys shared"):
                    assert ", ".join(filter(None, (aligned, norms, shared))) in found[kernel], kernel
    assert words(found[f"rows_kernel {name}"]) == set(ROWS)


@pytest.mark.parametrize("tf32", [False, True])
def test_every_form_and_way_out_of_float32(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which always copies what is normalised, so that no product has statistics."""
    with gpu_check.tf32(tf32):
        found = reached(monkeypatch, 9, 132, torch.float32)
    element = "Tf32" if tf32 else "F32"
    tile = f"LinearTile {element} 64 64 4 1 1 4 4"
    attention = [f"attention_kernel AttentionTile {element} {sizes}" for sizes in ("64 128 8 1", "128 64 4 1")]
    assert set(found) == {tile, *attention, "rows_kernel float"}
    assert words(found[tile]) == set(LINEAR) - {*STATISTICS, "leaves statistics"}
    assert all(words(found[kernel]) == set(ATTENTION) for kernel in attention)
    assert words(found["rows_kernel float"]) == set(ROWS)


def triton_launches(arch: int, processors: int) -> list[dict[str, Any]]:
    """What Triton would launch in float16: the kernel, its tile, and which of its tensors are there."""
    from gohsp_kernels.triton import config
    from tests.gohsp_kernels.triton.aot import recording

    Maker.normal = lambda self, *shape: torch.empty(*shape, dtype=torch.float16)  # type: ignore[assignment]
    backend = BACKENDS["triton"]
    with recording(config.Target("cuda", arch, processors)) as launches, torch.no_grad():
        for seed, draw in enumerate(explicit_cases().values()):
            call = draw(Maker(seed)).to(torch.float16)
            if isinstance(call, Chain):
                chain = backend.chain(call.x, [one.described()[0] for one in call.calls])  # type: ignore[misc]
                assert chain is not None
                chain(call.x, call.num_queries or call.x.shape[1])
            else:
                backend.run(*call.described())
    tensors = ("row_sum", "residual", "in_cols", "out_cols", "scale", "fc1_in_cols", "q_weight")
    return [
        {
            "kernel": launch.kernel.__name__,
            "tile": [launch.constants.get(name) for name in ("BLOCK_M", "BLOCK_N")],
            "there": [name for name in tensors if launch.signature.get(name, "constexpr") != "constexpr"],
            "names": list(launch.signature),
        }
        for launch in launches
    ]


@pytest.mark.slow
def test_every_tile_and_form_of_triton() -> None:
    module = "tests.gohsp_kernels.test_gpu_cases"
    code = f"import json; from {module} import triton_launches; print(json.dumps(triton_launches(90, 132)))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    launches = json.loads(run.stdout.splitlines()[-1])
    assert {launch["kernel"] for launch in launches} == {"linear_kernel", "attention_kernel", "mlp_kernel"}
    by_tile = defaultdict(set)
    for launch in launches:
        if launch["kernel"] == "linear_kernel":
            by_tile[tuple(launch["tile"])] |= {tuple(launch["there"])}
    assert set(by_tile) == {(128, 128), (128, 64), (64, 64), (32, 64), (16, 64)}
    for tile, there in by_tile.items():
        seen = {name for names in there for name in names}
        assert {"row_sum", "residual", "scale"} <= seen and any("row_sum" not in names for names in there), tile
        assert tile == (128, 128) or {"in_cols", "out_cols"} <= seen, tile  # which takes no columns


def test_names_are_of_one_case_each_and_a_case_is_the_same_again() -> None:
    for small in (False, True):
        draws = explicit_cases(small)
        assert len(draws) > 30
    for name, draw in draws.items():
        first, again, other = draw(Maker(3)), draw(Maker(3)), draw(Maker(4))
        assert torch.equal(first.x, again.x), name
        assert not torch.equal(first.x, other.x), name
        assert first.x.numel() < 60000, name  # of the small ones


def test_a_chain_is_its_sublayers() -> None:
    chain = explicit_cases(True)["chain for a class token, batch 1"](Maker(0))
    assert isinstance(chain, Chain) and chain.num_queries == 1
    x = chain.x.double()
    for call in chain.calls:
        x = call.to(torch.float64).with_x(x).run("reference")
    assert gpu_cases.error_of(chain.truth(), x[:, :1]) < 1e-12


def test_a_wrong_element_an_unwritten_one_and_a_second_result_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = explicit_cases(True)["mlp, all in, all out, batch 1"](Maker(0))
    run, calls = Call.run, iter(range(100))

    def judged(fault: Any) -> gpu_cases.Row:
        def faulty(call: Call, backend: str) -> Tensor:
            result = run(call, "reference").clone()
            if backend != "reference":
                fault(result, next(calls))
            return result

        monkeypatch.setattr(Call, "run", faulty)
        return judge(call, "triton", 1e-5)

    assert judged(lambda result, call: None)["ok"]
    assert not judged(lambda result, call: result[0, 0, :1].add_(1e-3))["ok"]
    assert not judged(lambda result, call: result[0, 0, :1].fill_(float("nan")))["ok"]
    assert not judged(lambda result, call: result[0, 0, :1].add_(1e-6 * call))["same"]


def test_the_largest_case_is_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Maker, "normal", lambda self, *shape: torch.empty(*shape, device="meta"))
    (draw,) = gpu_cases.LARGEST.values()
    call: Any = draw(Maker(0))
    assert not isinstance(call.operator, Linear)
    assert call.x.numel() // 64 * call.operator.fc1_weight.shape[0] > 2**31
