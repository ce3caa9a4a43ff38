# SPDX-License-Identifier: Apache-2.0
"""Pruning without training: what images tell of a model, what each group is worth, budgets, and the cut itself."""
