# SPDX-License-Identifier: Apache-2.0
"""Parts of :func:`gohsp.train`: ADMM, batches, losses, checkpoints, evaluation."""
