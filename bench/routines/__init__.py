# SPDX-License-Identifier: Apache-2.0
"""Measurements of speed on the CPU: one module a command, rows in one CSV file."""
