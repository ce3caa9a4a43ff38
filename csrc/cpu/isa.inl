// SPDX-License-Identifier: Apache-2.0
// Body of every isa_*.cpp: the kernels compiled for one instruction set, and the table of them.
// Tile sizes are chosen so that the accumulators, one panel row and one broadcast fit the vector registers.
#include "primitives.h"

namespace gohsp::GOHSP_ISA {

void apply(Activation activation, const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += W) {
    alignas(64) float part[W];
    store(part, load_first(x + i, min(W, count - i)));
    activate(activation, part, W, 1, W);
    store_first(y + i, load(part), min(W, count - i));
  }
}

void exponential(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += W)
    store_first(y + i, exp(load_first(x + i, min(W, count - i))), min(W, count - i));
}

extern const KernelTable table;
const KernelTable table = {GOHSP_ISA_NAME, packed_size, pack, sublayers, linear, attention, apply, exponential};

}  // namespace gohsp::GOHSP_ISA
