// SPDX-License-Identifier: Apache-2.0
// The baseline of the target, whatever it has: four lanes, which the compiler maps to SSE2 or to plain floats.
#define GOHSP_ISA scalar
#define GOHSP_ISA_NAME "scalar"
#define GOHSP_LANES 4
#define GOHSP_TILE_ROWS 4
#define GOHSP_TILE_VECTORS 2
#define GOHSP_ACTIVATION_LEVELS 255
#include "isa.inl"
