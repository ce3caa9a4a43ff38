# SPDX-License-Identifier: Apache-2.0
"""What a call costs before anything is launched: ``python -m bench.gpu.overhead``.

DeiT-Small's 24 sublayers at 4 heads and 960 neurons on a batch of no image, through the operators as they are: the
look at the parameters, the call into C++, the reading of packed weights. Microseconds, median of 200.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable

import torch

import gohsp_kernels as gk
from bench.harness import cases
from gohsp_kernels import cuda
from gohsp_kernels.chain import descriptor

CALLS = 200
WARM_UP = 10  # the first call packs the weights


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:]) * 1e6


def main() -> int:
    """Print the two figures; the exit code."""
    try:
        # Loading it registers the operators for tensors on the CPU, so that no GPU is needed.
        importlib.import_module("gohsp_kernels._checks_cuda")
    except ImportError as error:
        print(f"no figures: {error}")
        return 1
    work = cases.load(cases.Case("deit_small_patch16_224", "4x960"))
    blocks = work.compressed.to(torch.float16).blocks
    sublayers = [sublayer for block in blocks for sublayer in block.sublayers()]
    chain = gk.SublayerChain(sublayers)
    singles = [(getattr(cuda, sublayer.func.__name__), descriptor(sublayer)) for sublayer in sublayers]
    tokens = work.count.tokens
    x = torch.empty(0, tokens, work.mask.geometry.dim, dtype=torch.float16)

    def one_by_one() -> None:
        for run, operator in singles:
            run(operator, x, tokens)

    with torch.no_grad():
        # By the name of the backend, past its choice, which wants a GPU.
        print(f"one call of a chain of {len(sublayers)}   {median_us(lambda: chain._on('cuda', x, tokens)):7.1f} us")
        print(f"{len(sublayers)} calls of one sublayer    {median_us(one_by_one):7.1f} us")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
