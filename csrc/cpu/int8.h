// SPDX-License-Identifier: Apache-2.0
// Matrix product of row blocks with packed panels of int8 weights.
//
// A weight is an integer times the scale of its output. Activations become bytes row by row, when the row is there:
// x = (byte - zero) * scale, where the bytes span the row's range with 0 in it, so that 0 is exact and a one-sided row
// (what GELU leaves) wastes no bit. Products of bytes add up in int32 without rounding; the accumulators start from
// -zero * (sum of the output's weights), which is what the zero point adds, so they end at the exact sum. Then
// y = sum * (row scale * output scale) + bias, and everything from there on is fp32.
//
// A panel of N outputs is its weights' sums, scales and biases, then ceil(k / 4) rows of N groups of four weights. Its
// unit is the word of 4 bytes, so it has the shape of a panel of floats with a quarter of the rows, and the same tile.
#pragma once

#include "gemm.h"

namespace gohsp::GOHSP_ISA {

constexpr int64_t kHead = 3;  // rows of a panel before its weights

inline int64_t groups_of(int64_t k) { return ceil_div(k, 4); }

inline int64_t packed_size_int8(int64_t n, int64_t k) { return 4 * round_up(n, W) * (kHead + groups_of(k)); }

inline const int32_t* panel_int8(const Matrix& w, int64_t p) {
  return static_cast<const int32_t*>(w.panels) + p * N * (kHead + groups_of(w.k));
}

inline void pack_int8(const int8_t* weight, const float* scales, const float* bias, int64_t n, int64_t k,
                      void* panels) {
  int32_t* to = static_cast<int32_t*>(panels);
  const int64_t groups = groups_of(k);
  for (int64_t first = 0; first < n; first += N) {
    const int64_t width = panel_vectors(n, first / N) * W;
    __builtin_memset(to, 0, static_cast<size_t>(width * (kHead + groups)) * sizeof(int32_t));
    for (int64_t j = 0; j < min(width, n - first); ++j) {
      const int8_t* row = weight + (first + j) * k;
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += row[i];
      to[j] = sum;
      __builtin_memcpy(to + width + j, scales + first + j, sizeof(float));
      if (bias != nullptr) __builtin_memcpy(to + 2 * width + j, bias + first + j, sizeof(float));
      for (int64_t g = 0; g < groups; ++g)
        __builtin_memcpy(to + (kHead + g) * width + j, row + 4 * g, static_cast<size_t>(min(4, k - 4 * g)));
    }
    to += width * (kHead + groups);
  }
}

// Row i of `to` = x[0:columns] as bytes. The vector of x behind its columns is overwritten.
inline void quantise_row(float* x, int64_t columns, const Bytes& to, int64_t i) {
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

// c[0:Rows, 0:Vecs*W] = a[0:Rows] W^T + b for the panel at `head`, `groups` groups of four inputs deep.
template <int64_t Rows, int64_t Vecs>
void tile_int8(const Bytes& a, int64_t first_row, const int32_t* head, int64_t groups, float* c, Ahead ahead) {
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
    ahead.fetch(g);
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

using TileInt8 = void (*)(const Bytes&, int64_t, const int32_t*, int64_t, float*, Ahead);

struct TileInt8Table {
  TileInt8 of[M + 1][NV + 1];
};

template <int64_t Rows, int64_t Vecs>
constexpr void fill(TileInt8Table& table) {
  table.of[Rows][Vecs] = tile_int8<Rows, Vecs>;
  if constexpr (Vecs > 1) {
    fill<Rows, Vecs - 1>(table);
  } else if constexpr (Rows > 1) {
    fill<Rows - 1, NV>(table);
  }
}

constexpr TileInt8Table make_int8_tiles() {
  TileInt8Table table{};
  fill<M, NV>(table);
  return table;
}

constexpr TileInt8Table kInt8Tiles = make_int8_tiles();

// As multiply in gemm.h, for bytes and int8 weights.
template <class Emit>
inline void multiply_int8(const Bytes& a, int64_t rows, const Matrix& w, const Emit& emit) {
  alignas(64) float c[M * N];
  const int64_t tiles = ceil_div(rows, M), groups = groups_of(w.k);
  for (int64_t p = 0; p < panel_count(w.n); ++p) {
    const int32_t* head = panel_int8(w, p);
    const int64_t vectors = panel_vectors(w.n, p);
    const int32_t* next = head + vectors * W * (kHead + groups);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r0 = part_begin(rows, tiles, t), r1 = part_begin(rows, tiles, t + 1);
      const Ahead ahead = {next + part_begin(groups * N, tiles, t), ceil_div(N, tiles)};
      kInt8Tiles.of[r1 - r0][vectors](a, r0, head, groups, c, ahead);
      emit(r0, r1 - r0, p * N, min(N, w.n - p * N), c);
    }
  }
}

}  // namespace gohsp::GOHSP_ISA
