// SPDX-License-Identifier: Apache-2.0
// AArch64 Advanced SIMD: 32 registers hold 24 accumulators, 4 panel vectors and 1 broadcast.
#define GOHSP_ISA neon
#define GOHSP_ISA_NAME "neon"
#define GOHSP_LANES 4
#define GOHSP_TILE_ROWS 6
#define GOHSP_TILE_VECTORS 4
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
