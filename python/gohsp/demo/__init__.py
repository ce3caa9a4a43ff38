# SPDX-License-Identifier: Apache-2.0
"""The demo: a trained ViT ranked, pruned, compressed, saved, loaded, checked and timed on real images."""
