# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: NVIDIA and AMD GPUs, and CPU tensors under TRITON_INTERPRET=1.

Nothing is imported here, so that asking :mod:`.support` whether it can run does not need Triton.
"""
