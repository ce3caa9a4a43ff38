// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI, and products of pairs of bfloat16 numbers.
#define GOHSP_ISA avx512bf16
#define GOHSP_ISA_NAME "avx512bf16"
#define GOHSP_LANES 16
#define GOHSP_TILE_ROWS 12
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
