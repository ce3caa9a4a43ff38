# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of gohsp against what else runs a pruned vision transformer on a CPU: ``python -m bench --help``.

Each routine checks every contender against a float64 computation before it times one, lets the contenders take turns in
one process, and appends to one CSV file. Charts are drawn from that file alone.
"""
