// SPDX-License-Identifier: Apache-2.0
// The kernels and their launches, built by the host's compiler.
#include "../attention.cu"
#include "../checksum.cu"
#include "../linear.cu"
#include "../linear_float.cu"
#include "../linear_hopper.cu"
#include "../rows.cu"
