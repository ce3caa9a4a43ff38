// SPDX-License-Identifier: Apache-2.0
// Weights of 8 bits.
//
// A weight is an integer times the scale of its output. Activations become bytes row by row, when the row is there:
// x = (byte - zero) * scale, where the bytes span the row's range with 0 in it, so that 0 is exact and a one-sided row
// (what GELU leaves) wastes no bit. Products of bytes add up in int32 without rounding; the accumulators start from
// -zero * (sum of the output's weights), which is what the zero point adds, so they end at the exact sum. Then
// y = sum * (row scale * output scale) + bias, and everything from there on is fp32.
//
// The head of a panel is its weights' sums, scales and biases; then come ceil(k / 4) rows of words of four weights, so
// it has the shape of a panel of floats with a quarter of the rows, and the same tile.
//
// Attention beside such weights is in bfloat16 where the CPU multiplies pairs of it: that rounds far less than 8 bits.
#pragma once

#include "../amx.h"

namespace gohsp::GOHSP_ISA {

struct Int8 {
  static constexpr Format kFormat = Format::int8;
  static constexpr int64_t kHead = 3;
  static constexpr bool kZeroed = true;
  static constexpr bool kAttendsInPairs = kHasPairProducts;
  using Rows = RoundedRows;

  static int64_t depth(int64_t k) { return whole_steps(ceil_div(k, 4)); }
  static const Rows& of(const Lhs& lhs) { return lhs.rounded; }
  static int64_t row_bytes(int64_t k) { return 4 * depth(k) + W; }

  static void pack_panel(const Unpacked& from, int64_t first, int64_t used, int64_t width, int32_t* to) {
    const int64_t k = from.k;
    for (int64_t j = 0; j < used; ++j) {
      const int8_t* row = static_cast<const int8_t*>(from.weight) + (first + j) * k;
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += row[i];
      to[j] = sum;
      __builtin_memcpy(to + width + j, from.scales + first + j, sizeof(float));
      if (from.bias != nullptr) __builtin_memcpy(to + 2 * width + j, from.bias + first + j, sizeof(float));
      for (int64_t g = 0; g < ceil_div(k, 4); ++g)
        __builtin_memcpy(to + (kHead + g) * width + j, row + 4 * g, static_cast<size_t>(min(4, k - 4 * g)));
    }
  }

  // Row i of `to` = x[0:columns] as bytes. The vector of x behind its columns is overwritten.
  static void round_row(float* x, int64_t columns, const RoundedRows& to, int64_t i) {
    store(x + columns, Vec{});  // zeros do not change the range
    Vec low = {}, high = {}, poison = {};
    for (int64_t j = 0; j < columns; j += W) {
      const Vec v = load(x + j);
      low = larger(-v, low);
      high = larger(v, high);
      poison += v * 0.0f;  // NaN where v is not finite, which a comparison would lose
    }
    const float lowest = -max_lanes(low), range = max_lanes(high) - lowest;
    // A range that has no reciprocal in fp32 is as good as none.
    const bool flat = range < 1e-30f;
    const float inverse = flat ? 0.0f : static_cast<float>(kLevels) / range;
    const float zero = (kRound - lowest * inverse) - kRound;
    to.scales[i] = (flat ? 0.0f : range / static_cast<float>(kLevels)) + sum_lanes(poison);
    to.zeros[i] = static_cast<int32_t>(zero) + kLowest;
    uint8_t* bytes = to.values + i * to.ld;
    const float shift = kRound + zero;
    for (int64_t j = 0; j < columns; j += W) {
      // Rounding can lead one step past either end.
      const Vec v = at_most(at_least(load(x + j) * inverse + shift, kRound), kRound + static_cast<float>(kLevels));
      store_bytes(bytes + j, float_as_bits(v) + kLowest);  // the low byte of kRound itself is zero
    }
  }

#if defined(GOHSP_TILE_REGISTERS)
  using TileProducts = ByteProducts;
  static const float* start(const int32_t*) { return kZeros; }  // all bits are zero, as integers too

  // Sums of products, as they left the tiles, become results.
  static void finish(const Rows& a, int64_t first_row, int64_t rows, const int32_t* head, int64_t vectors, float* c) {
    const int64_t width = vectors * W;
    for (int64_t j = 0; j < width; j += W) {
      const IntVec sums = load_ints(head + j);
      const Vec scale = bits_as_float(load_ints(head + width + j));
      const Vec bias = bits_as_float(load_ints(head + 2 * width + j));
      for (int64_t i = 0; i < rows; ++i) {
        const IntVec sum = float_as_bits(load(c + i * N + j)) - sums * a.zeros[first_row + i];
        store(c + i * N + j, __builtin_convertvector(sum, Vec) * (a.scales[first_row + i] * scale) + bias);
      }
    }
  }
#else
  using Tile = void (*)(const RoundedRows&, int64_t, const int32_t*, int64_t, float*, Prefetch);

  // c[0:Rows, 0:Vecs*W] = a[0:Rows] W^T + b for the panel at `head`, `groups` groups of four inputs deep.
  template <int64_t Rows, int64_t Vecs>
  static void tile(const RoundedRows& a, int64_t first_row, const int32_t* head, int64_t groups, float* c,
                   Prefetch prefetch) {
    constexpr int64_t width = Vecs * W;
    IntVec acc[Rows][Vecs];
#pragma GCC unroll 32
    for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 32
      for (int64_t v = 0; v < Vecs; ++v) acc[i][v] = load_ints(head + v * W) * -a.zeros[first_row + i];
    const int32_t* b = head + kHead * width;
    const int64_t ld = a.ld;
    // One pointer for three rows (an x86 address adds ld or 2 ld to it), hidden from the compiler's own ideas: with one for
    // each row it runs out of registers and moves pointers through the ports of the multipliers.
    const uint8_t* bytes[ceil_div(Rows, 3)];
#pragma GCC unroll 32
    for (int64_t i = 0; i < Rows; i += 3) bytes[i / 3] = a.values + (first_row + i) * ld;
#pragma GCC unroll 4
    for (int64_t g = 0; g < groups; ++g, b += width) {
      prefetch.fetch(g);
      IntVec row[Vecs];
#pragma GCC unroll 32
      for (int64_t v = 0; v < Vecs; ++v) row[v] = load_ints(b + v * W);
#pragma GCC unroll 32
      for (int64_t i = 0; i < Rows; ++i) {
        const IntVec x = splat_ints(bytes[i / 3] + i % 3 * ld);
#pragma GCC unroll 32
        for (int64_t v = 0; v < Vecs; ++v) acc[i][v] = dot4(acc[i][v], x, row[v]);
      }
      for (const uint8_t*& p : bytes) {
        p += 4;
        asm("" : "+r"(p));
      }
    }
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) {
      const Vec scale = bits_as_float(load_ints(head + width + v * W));
      const Vec bias = bits_as_float(load_ints(head + 2 * width + v * W));
#pragma GCC unroll 32
      for (int64_t i = 0; i < Rows; ++i)
        store(c + i * N + v * W, __builtin_convertvector(acc[i][v], Vec) * (a.scales[first_row + i] * scale) + bias);
    }
  }

  static void run(Tile tile, const Rows& a, int64_t r0, const int32_t* head, int64_t, int64_t depth, float* c,
                  Prefetch prefetch) {
    tile(a, r0, head, depth, c, prefetch);
  }
#endif
};

}  // namespace gohsp::GOHSP_ISA
