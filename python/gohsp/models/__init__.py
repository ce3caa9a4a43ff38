# SPDX-License-Identifier: Apache-2.0
"""What gohsp knows of models: the parts that pruning works on, and one adapter for each family of models."""
