// SPDX-License-Identifier: Apache-2.0
// Weights in bfloat16, for instructions that multiply pairs of them: those of AMX, AVX512_BF16 and Arm's BF16.
//
// Weights and activations are rounded to bfloat16, to the nearest and to even on a tie; products add up in fp32 from
// the bias on. The words of a panel are pairs of inputs, with zeros past the last one. Other instruction sets run the
// same arithmetic in plain vectors, for tests of it; they gain nothing by it.
#pragma once

#include "../amx.h"

namespace gohsp::GOHSP_ISA {

inline IntVec bf16_bits(Vec v) {
  const UintVec bits = (UintVec)v;
  // Adding to a NaN could carry into its sign and make a number of it.
  const UintVec rounded = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
  return (IntVec)(rounded >> 16);
}

#if GOHSP_LANES == 16 && defined(__AVX512BF16__)
inline void round_to_bf16(Vec low, Vec high, void* to) {
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  __builtin_memcpy(to, &halves, sizeof halves);
}
#elif GOHSP_LANES == 4 && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline void round_to_bf16(Vec low, Vec high, void* to) {
  const bfloat16x8_t halves = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
  __builtin_memcpy(to, &halves, sizeof halves);
}
#else
inline void round_to_bf16(Vec low, Vec high, void* to) {
  uint16_t halves[2 * W];
  const IntVec l = bf16_bits(low), h = bf16_bits(high);
  for (int64_t i = 0; i < W; ++i) {
    halves[i] = static_cast<uint16_t>(l[i]);
    halves[W + i] = static_cast<uint16_t>(h[i]);
  }
  __builtin_memcpy(to, halves, sizeof halves);
}
#endif

// Words of a row of k inputs.
inline int64_t pairs_of(int64_t k) { return whole_steps(ceil_div(k, 2)); }

// Bytes of a row of k inputs, which is written by whole vectors of pairs.
inline int64_t pair_bytes(int64_t k) { return 4 * round_up(pairs_of(k), W); }

// y[i, j] = the pair of x[2 i, j] and x[2 i + 1, j] for all pairs of `rows` rows; zero past the rows of x. The right side
// of a block from floats; x and y may overrun a row by less than a vector.
inline void pair_rows(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* y, int64_t ldy) {
  for (int64_t i = 0; i < pairs_of(rows); ++i)
    for (int64_t j = 0; j < columns; j += W) {
      const Vec even = 2 * i < rows ? load(x + 2 * i * ldx + j) : Vec{};
      const Vec odd = 2 * i + 1 < rows ? load(x + (2 * i + 1) * ldx + j) : Vec{};
      store(y + i * ldy + j, bits_as_float(bf16_bits(even) | (bf16_bits(odd) << 16)));
    }
}

// Row i of `to` = x[0:columns] in bfloat16. Two vectors of x behind its columns are overwritten.
inline void narrow_row(float* x, int64_t columns, const RoundedRows& to, int64_t i) {
  store(x + columns, Vec{});
  store(x + columns + W, Vec{});
  for (int64_t j = 0; j < pair_bytes(columns) / 2; j += 2 * W)
    round_to_bf16(load(x + j), load(x + j + W), to.values + i * to.ld + 2 * j);
}

struct BFloat16 {
  static constexpr Format kFormat = Format::bfloat16;
  static constexpr int64_t kHead = 1;  // biases
  static constexpr bool kZeroed = true;
  static constexpr bool kAttendsInPairs = true;
  using Rows = RoundedRows;

  static int64_t depth(int64_t k) { return pairs_of(k); }
  static const Rows& of(const Lhs& lhs) { return lhs.rounded; }
  static int64_t row_bytes(int64_t k) { return pair_bytes(k); }
  static void round_row(float* x, int64_t columns, const RoundedRows& to, int64_t i) { narrow_row(x, columns, to, i); }

  static void round_tile(float* c, int64_t rows, int64_t columns, const RoundedRows& to, int64_t row, int64_t column) {
    static_assert(N % (2 * W) == 0);
    for (int64_t i = 0; i < rows; ++i, c += N) {
      for (int64_t j = columns; j < round_up(columns, 2 * W); ++j) c[j] = 0.0f;
      for (int64_t j = 0; j < columns; j += 2 * W)
        round_to_bf16(load(c + j), load(c + j + W), to.values + (row + i) * to.ld + 2 * (column + j));
    }
  }

  static void pack_panel(const Unpacked& from, int64_t first, int64_t used, int64_t width, int32_t* to) {
    const uint16_t* weight = static_cast<const uint16_t*>(from.weight) + first * from.k;
    if (from.bias != nullptr) __builtin_memcpy(to, from.bias + first, static_cast<size_t>(used) * sizeof(float));
    char* pairs = reinterpret_cast<char*>(to + width);
    for (int64_t i = 0; i < from.k; ++i)
      for (int64_t j = 0; j < used; ++j)
        __builtin_memcpy(pairs + 4 * (i / 2 * width + j) + 2 * (i % 2), weight + j * from.k + i, sizeof(uint16_t));
  }

#if defined(GOHSP_TILE_REGISTERS)
  using TileProducts = PairProducts;
  static const float* start(const int32_t* head) { return reinterpret_cast<const float*>(head); }
  static void finish(const Rows&, int64_t, int64_t, const int32_t*, int64_t, float*) {}
#else
  using Tile = FloatTile;
  static Vec spread(const float* word) { return bits_as_float(splat_ints(word)); }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return dot2(sum, x, w); }

  template <int64_t Rows, int64_t Vecs>
  static constexpr Tile tile = float_tile<BFloat16, Rows, Vecs>;

  static void run(Tile tile, const Rows& a, int64_t r0, const int32_t* head, int64_t vectors, int64_t depth, float* c,
                  Prefetch prefetch) {
    const float* b = reinterpret_cast<const float*>(head);
    tile(reinterpret_cast<const float*>(a.values + r0 * a.ld), a.ld / 4, b + vectors * W, vectors * W, b, depth, c, N,
         prefetch);
  }
#endif
};

// c[0:rows, 0:columns] = left b for up to kBlockRows rows, b in pairs. c may overrun by less than a vector, and with tiles
// up to kBlockRows rows.
inline void multiply_pairs(const RoundedRows& left, [[maybe_unused]] int64_t rows, int64_t inputs, const float* b,
                           int64_t ldb, int64_t columns, float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += N) {
    const int64_t vectors = min(NV, ceil_div(columns - j, W));
#if defined(GOHSP_TILE_REGISTERS)
    tile_block<PairProducts>(left.values, left.ld, b + j, ldb, kZeros, vectors, pairs_of(inputs) / kTileRows, c + j,
                             ldc, [](int64_t) {});
#else
    kTiles<BFloat16>.of[rows][vectors](reinterpret_cast<const float*>(left.values), left.ld / 4, b + j, ldb, kZeros,
                                       pairs_of(inputs), c + j, ldc, {b + j, 0});
#endif
  }
}

}  // namespace gohsp::GOHSP_ISA
