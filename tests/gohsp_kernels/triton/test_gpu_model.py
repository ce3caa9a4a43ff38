# SPDX-License-Identifier: Apache-2.0
"""The model on paper: its sums by hand, the promises that it keeps, and that it never passes for a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import pytest
import timm
import torch
from typer.testing import CliRunner

import gohsp
from bench.cli import app
from bench.gpu import paper_model
from bench.gpu.paper_model import GPUS, Block, Modelled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small() -> list[Modelled]:
    return list(paper_model.results(["deit_small_patch16_224"], [1, 64]))


def pairs(results: Iterable[Modelled]) -> Iterator[tuple[Modelled, Modelled]]:
    """Our launches and the unfused ones for each model, mask, batch and GPU."""
    listed = list(results)
    for ours, unfused in zip(listed[::2], listed[1::2], strict=True):
        assert (ours.sequence, unfused.sequence) == ("ours", "unfused")
        yield ours, unfused


def pick(results: list[Modelled], gpu: str, layout: str, batch: int, sequence: str) -> Modelled:
    (found,) = (r for r in results if (r.gpu, r.layout, r.batch, r.sequence) == (gpu, layout, batch, sequence))
    return found


def block(layout: str, batch: int) -> Block:
    features, tokens, masks = paper_model.masks("deit_small_patch16_224")
    return Block(masks[layout].blocks[0].layout(), features, batch, tokens)


def test_bytes_of_the_presets() -> None:
    """On every GPU at batch 64: at most 1.15 times the least, and 1.5 times fewer than the sliced model unfused."""
    checked = 0
    for ours, unfused in pairs(paper_model.results(batches=[64])):
        if ours.layout == "preset":
            assert ours.megabytes <= 1.15 * ours.least_megabytes, ours
            assert unfused.megabytes >= 1.5 * ours.megabytes, ours
            checked += 1
    assert checked == len(paper_model.PRESETS) * len(GPUS)


def test_nothing_moves_less_than_the_least() -> None:
    for ours, unfused in pairs(paper_model.results(batches=[1, 256])):
        assert ours.in_and_out_megabytes < ours.least_megabytes <= ours.megabytes
        assert unfused.megabytes == unfused.least_megabytes and ours.launches < unfused.launches


def test_bytes_by_hand() -> None:
    """DeiT-Small with 4 heads and 960 neurons: 64 images of 197 rows, 2 bytes a number."""
    rows = 64 * 197
    qkv, attention, proj, fc1, fc2 = paper_model.ours(GPUS[1], block("preset", 64))
    assert qkv.least_bytes == 2 * (rows * (384 + 768) + 384 * 768)
    assert attention.least_bytes == 2 * rows * (768 + 256)
    assert proj.least_bytes == 2 * (rows * (256 + 384 + 384) + 256 * 384)
    assert fc1.least_bytes == 2 * (rows * (384 + 960) + 384 * 960)
    assert fc2.least_bytes == 2 * (rows * (960 + 384 + 384) + 960 * 384)
    for launch in (qkv, attention, proj, fc1, fc2):
        assert launch.least_bytes <= launch.bytes <= 1.01 * launch.least_bytes
        assert launch.flops <= launch.executed


def test_flops_are_those_of_the_cost_count(small: list[Modelled]) -> None:
    model = timm.create_model("deit_small_patch16_224").eval()
    blocks = gohsp.count(model).blocks
    macs = sum(b.attn_macs + b.mlp_macs for b in blocks)
    for sequence in ("ours", "unfused"):
        assert pick(small, "H100 SXM", "dense", 1, sequence).gflops == pytest.approx(2 * macs / 1e9, rel=1e-3)


def test_a_ragged_mask_costs_library_kernels_more_launches(small: list[Modelled]) -> None:
    ours, unfused = (pick(small, "H100 SXM", "ragged", 64, sequence) for sequence in ("ours", "unfused"))
    assert ours.launches == 60 and unfused.launches > 120
    assert unfused.gflops == ours.gflops
    assert unfused.megabytes > 1.5 * ours.megabytes


def test_small_batches_are_bound_by_launches(small: list[Modelled]) -> None:
    assert pick(small, "H100 SXM", "preset", 1, "ours").bound == "launch"
    assert pick(small, "H100 SXM", "preset", 64, "ours").bound == "DRAM"


def test_rows_that_do_not_fit_the_cache_are_read_again() -> None:
    tiny_cache = paper_model.Gpu("small", GPUS[1].target, GPUS[1].flops, GPUS[1].bandwidth, 1e6)
    product = block("preset", 64).products(1, 1)["fc1"]
    once = paper_model.our_linear(GPUS[1], "fc1", product, product)
    again = paper_model.our_linear(tiny_cache, "fc1", product, product)
    assert again.bytes > 2 * once.bytes and again.least_bytes == once.least_bytes


def test_idle_tiles_count() -> None:
    assert paper_model.idle_too(132, 132) == 1.0
    assert paper_model.idle_too(133, 132) == pytest.approx(264 / 133)


def test_narrow_models_take_one_launch_an_mlp() -> None:
    (line,) = (
        r
        for r in paper_model.results(["deit_tiny_patch16_224"], [256], GPUS[1:2])
        if r.layout == "preset" and r.sequence == "ours"
    )
    assert line.launches == 48
    assert line.megabytes <= 1.15 * line.least_megabytes


def test_every_line_says_modelled() -> None:
    """And the command is reachable: python -m bench gpu-model."""
    result = CliRunner().invoke(app, ["gpu-model", "--model", "deit_tiny_patch16_224", "--batch", "1", "64"])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and len(lines) == 2 * 3 * 3 * 2
    assert all(line.startswith("modelled ") for line in lines)


def test_by_default_it_covers_the_three_models_and_batches_to_256() -> None:
    lines: list[str] = []
    paper_model.run(write=lines.append)
    assert len(lines) == 3 * 4 * 3 * 3 * 2
    for words in (
        *paper_model.PRESETS,
        "batch   1",
        "batch 256",
        "A100",
        "H100",
        "MI300X",
        "dense",
        "ragged",
        "unfused",
    ):
        assert any(words in line for line in lines)


def test_model_without_a_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"model: wanted one of deit_tiny_patch16_224, .*; got 'resnet50'"):
        paper_model.run(["resnet50"])


def test_a_row_tile_between_two_waves_is_read_twice() -> None:
    """6 column tiles do not divide a wave of 2 times 133 programs; they do divide one of 2 times 132."""
    product = block("preset", 64).products(1, 1)["qkv"]
    even = paper_model.our_linear(GPUS[1], "qkv", product, product)
    target = dataclasses.replace(GPUS[1].target, processors=133)
    odd = paper_model.our_linear(dataclasses.replace(GPUS[1], target=target), "qkv", product, product)
    assert odd.bytes - even.bytes == 2 * 384 * 128 * (99 * 6 // 266)


def test_models_are_only_looked_at() -> None:
    """No weight is made: the 86 million of DeiT-Base would take a second and a third of a gigabyte."""
    features, tokens, masks = paper_model.masks("deit_base_patch16_224")
    assert (features, tokens) == (768, 197)
    assert set(masks) == {"dense", "preset", "ragged"}
    assert all(mask.blocks[0].heads.device == torch.device("cpu") for mask in masks.values())
