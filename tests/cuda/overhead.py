# SPDX-License-Identifier: Apache-2.0
"""What a call costs before anything is launched: ``python -m tests.cuda.overhead``.

DeiT-Small's 24 sublayers at 4 heads and 960 neurons on a batch of no image, through the operators as they are: the
look at the parameters, the call into C++, the reading of packed weights. Microseconds, median of 200.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import gohsp_kernels as gk
from gohsp_kernels import cuda
from gohsp_kernels.testing import Maker
from tests.kernels.test_chain import bound

from . import helpers  # noqa: F401 (registers the operators)


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(210):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[10:]) * 1e6


def main() -> None:
    maker, calls = Maker(0), []
    for _ in range(12):
        calls.append(maker.attention_sublayer(0, 0, 384, [64] * 4, [64] * 4).to(torch.float16))
        calls.append(maker.mlp_sublayer((0,), 384, 960).to(torch.float16))
    x = torch.empty(0, 197, 384, dtype=torch.float16)
    chain = gk.SublayerChain([bound(call) for call in calls])
    singles = [(getattr(cuda, call.operator.name), call.described()) for call in calls]

    def one_by_one() -> None:
        for run, (operator, _, queries) in singles:
            run(operator, x, queries)

    with torch.no_grad():
        print(f"one call of a chain of 24   {median_us(lambda: chain._on('cuda', x, 197)):7.1f} us")
        print(f"24 calls of one sublayer    {median_us(one_by_one):7.1f} us")


if __name__ == "__main__":
    main()
