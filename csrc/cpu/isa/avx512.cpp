// SPDX-License-Identifier: Apache-2.0
// AVX-512 F and BW: 32 registers hold 24 accumulators, 2 panel vectors and 1 broadcast.
#define GOHSP_ISA avx512
#define GOHSP_ISA_NAME "avx512"
#define GOHSP_LANES 16
#define GOHSP_TILE_ROWS 12
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 127
#include "isa.inl"
