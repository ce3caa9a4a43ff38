# SPDX-License-Identifier: Apache-2.0
"""Measurements on a GPU, and what can be said of one without it: modelled, or read from the binaries."""
