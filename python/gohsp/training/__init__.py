# SPDX-License-Identifier: Apache-2.0
"""Training: :func:`gohsp.train`, and its parts: ADMM, batches, losses, checkpoints, evaluation."""
