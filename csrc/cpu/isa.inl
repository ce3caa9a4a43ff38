// SPDX-License-Identifier: Apache-2.0
// Body of every isa_*.cpp: the kernels compiled for one instruction set, and the table of them.
// Tile sizes are chosen so that the accumulators, one panel row and one broadcast fit the vector registers.
#include "checksum.h"
#include "primitives.h"

namespace gohsp::GOHSP_ISA {

struct ProductBuffers {
  Weights weights;
  int64_t rows, k;
  float* row = nullptr;
  Bytes bytes = {};

  void carve(Carver& carver) {
    row = carver.take<float>(row_stride(k));
    const int64_t ld = rounded_stride(weights, k), padded = round_up(rows, kBlockRows);
    bytes = {carver.take<uint8_t>(padded * ld), carver.take<float>(rows), carver.take<int32_t>(rows), ld};
  }
};

void rounded_product(const Matrix& weight, const float* x, int64_t rows, float* y) {
  ProductBuffers buffers{weight.weights, rows, weight.k};
  place(buffers);
  const Tiles tiles(weight.weights == Weights::bf16);
  for (int64_t i = 0; i < rows; ++i) {
    copy_row(x + i * weight.k, weight.k, buffers.row);
    round_row(weight.weights, buffers.row, weight.k, buffers.bytes, i);
  }
  multiply(Left(buffers.bytes), rows, weight, [&](int64_t r, int64_t count, int64_t n, int64_t columns, float* c) {
    for (int64_t i = 0; i < count; ++i) copy_row(c + i * N, columns, y + (r + i) * weight.n + n);
  });
}

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
const KernelTable table = {GOHSP_ISA_NAME, packed_size, pack,  packed_size_int8, pack_int8, packed_size_bf16, pack_bf16,
                           kLevels,        sublayers,   embed, linear,           attention, rounded_product,  apply,
                           exponential,    checksum};

}  // namespace gohsp::GOHSP_ISA
