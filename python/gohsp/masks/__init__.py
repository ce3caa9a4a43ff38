# SPDX-License-Identifier: Apache-2.0
"""Masks, which say what of a model is kept: their layouts, their text in files, and the table of them."""
