// SPDX-License-Identifier: Apache-2.0
// Matrix products, whatever form the weights have.
#pragma once

#include "bf16.h"
#include "int8.h"

namespace gohsp::GOHSP_ISA {

// The left side of a product: floats, or what rounded weights want.
struct Left {
  const float* floats;
  int64_t ld;
  Bytes bytes;

  Left(const float* floats, int64_t ld) : floats(floats), ld(ld), bytes{} {}
  explicit Left(const Bytes& bytes) : floats(nullptr), ld(0), bytes(bytes) {}
};

// From one rounded row of k columns to the next, in bytes: whole vectors, and an odd number of cache lines.
inline int64_t rounded_stride(Weights weights, int64_t k) {
  const int64_t bytes = weights == Weights::int8 ? k + W : 2 * padded_inputs(k);
  return (ceil_div(bytes, 64) | 1) * 64;
}

// Row i of `to` = x[0:columns], rounded for these weights. Two vectors of x behind its columns are overwritten.
inline void round_row(Weights weights, float* x, int64_t columns, const Bytes& to, int64_t i) {
  if (weights == Weights::int8) return quantise_row(x, columns, to, i);
  narrow_row(x, columns, to, i);
}

template <class Emit>
inline void multiply(const Left& a, int64_t rows, const Matrix& w, const Emit& emit) {
  switch (w.weights) {
    case Weights::fp32: return multiply(a.floats, a.ld, rows, w, 0, panel_count(w.n), emit);
    case Weights::int8: return multiply_int8(a.bytes, rows, w, emit);
    case Weights::bf16: return multiply_bf16(a.bytes, rows, w, emit);
  }
}

}  // namespace gohsp::GOHSP_ISA
