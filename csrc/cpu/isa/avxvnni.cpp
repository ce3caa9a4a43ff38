// SPDX-License-Identifier: Apache-2.0
// AVX2 with VNNI: as AVX2, and four products of bytes in one instruction that does not saturate.
#define GOHSP_ISA avxvnni
#define GOHSP_ISA_NAME "avxvnni"
#define GOHSP_LANES 8
#define GOHSP_TILE_ROWS 6
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
