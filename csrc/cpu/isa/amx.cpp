// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI, and AMX: tile registers whose products take bfloat16 and bytes.
#define GOHSP_ISA amx
#define GOHSP_ISA_NAME "amx"
#define GOHSP_LANES 16
#define GOHSP_TILE_ROWS 12
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 255
#define GOHSP_TILE_REGISTERS
#include "isa.inl"
