// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI: as AVX-512, and four products of bytes in one instruction that does not saturate.
#define GOHSP_ISA avx512vnni
#define GOHSP_ISA_NAME "avx512vnni"
#define GOHSP_LANES 16
#define GOHSP_TILE_ROWS 12
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
