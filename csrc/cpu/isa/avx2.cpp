// SPDX-License-Identifier: Apache-2.0
// AVX2 and FMA: 16 registers hold 12 accumulators, 2 panel vectors and 1 broadcast.
#define GOHSP_ISA avx2
#define GOHSP_ISA_NAME "avx2"
#define GOHSP_LANES 8
#define GOHSP_TILE_ROWS 6
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 127
#include "isa.inl"
