// SPDX-License-Identifier: Apache-2.0
// Weights as they are, in float32.
//
// The micro-kernel holds an M x N tile of the result in registers, broadcasts one element of each of M rows and
// multiplies it with the panel's row: M * NV multiply-adds for M + NV loads. Rows are not packed; they come from our own
// buffers, whose row strides avoid the powers of two that would crowd one cache set.
#pragma once

#include "format.h"

namespace gohsp::GOHSP_ISA {

struct Float32 {
  static constexpr Format kFormat = Format::float32;
  static constexpr int64_t kHead = 1;  // biases
  static constexpr bool kZeroed = false;
  using Rows = FloatRows;
  using Tile = FloatTile;

  static int64_t depth(int64_t k) { return k; }
  static const Rows& of(const Lhs& lhs) { return lhs.floats; }

  static void pack_panel(const Unpacked& from, int64_t first, int64_t used, int64_t width, int32_t* panel) {
    const float* weight = static_cast<const float*>(from.weight) + first * from.k;
    float* to = reinterpret_cast<float*>(panel);
    for (int64_t j = 0; j < width; ++j) to[j] = (from.bias != nullptr && j < used) ? from.bias[first + j] : 0.0f;
    to += width;
    for (int64_t i = 0; i < from.k; ++i, to += width)
      for (int64_t j = 0; j < width; ++j) to[j] = j < used ? weight[j * from.k + i] : 0.0f;
  }

  static Vec spread(const float* value) { return splat(*value); }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return sum + x * w; }

  template <int64_t Rows, int64_t Vecs>
  static constexpr Tile tile = float_tile<Float32, Rows, Vecs>;

  static void run(Tile tile, const Rows& a, int64_t r0, const int32_t* head, int64_t vectors, int64_t depth, float* c,
                  Prefetch prefetch) {
    const float* b = reinterpret_cast<const float*>(head);
    tile(a.values + r0 * a.ld, a.ld, b + vectors * W, vectors * W, b, depth, c, N, prefetch);
  }
};

}  // namespace gohsp::GOHSP_ISA
