# SPDX-License-Identifier: Apache-2.0
"""What the command line does with a directory: data, models, classifiers, the stages of a run and its report."""
