// SPDX-License-Identifier: Apache-2.0
// NEON with the dot product of bytes (Armv8.2 dotprod).
#define GOHSP_ISA neondot
#define GOHSP_ISA_NAME "neondot"
#define GOHSP_LANES 4
#define GOHSP_TILE_ROWS 6
#define GOHSP_TILE_VECTORS 4
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
