// SPDX-License-Identifier: Apache-2.0
// NEON with dot products of bytes and of pairs of bfloat16 numbers (Armv8.6 bf16).
#define GOHSP_ISA neonbf16
#define GOHSP_ISA_NAME "neonbf16"
#define GOHSP_LANES 4
#define GOHSP_TILE_ROWS 6
#define GOHSP_TILE_VECTORS 4
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
