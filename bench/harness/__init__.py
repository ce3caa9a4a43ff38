# SPDX-License-Identifier: Apache-2.0
"""What every measurement stands on: who runs what, is it right, how long it takes, where the numbers go."""
