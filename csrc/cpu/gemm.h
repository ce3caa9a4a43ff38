// SPDX-License-Identifier: Apache-2.0
// Matrix product of row blocks with packed panels.
//
// A weight matrix [n, k] is packed into panels of N = NV * W outputs. A panel is its N biases followed by k rows of N
// weights, so the kernel starts its accumulators from the bias and then reads straight on. The last panel is as
// narrow as whole vectors allow: a ragged n costs at most W - 1 idle lanes, not a panel.
//
// The micro-kernel holds an M x N tile of the result in registers, broadcasts one element of each of M rows and
// multiplies it with the panel's row: M * NV multiply-adds for M + NV loads. Rows are not packed; they come from our own
// buffers, whose row strides avoid the powers of two that would crowd one cache set.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gohsp::GOHSP_ISA {

constexpr int64_t M = GOHSP_TILE_ROWS;
constexpr int64_t NV = GOHSP_TILE_VECTORS;
constexpr int64_t N = NV * W;

// A row stride, in floats, for a buffer of ours: whole vectors, room for one tile of overrun, and an odd number of
// cache lines so that neighbouring rows fall into different sets.
inline int64_t row_stride(int64_t columns) {
  const int64_t lines = ceil_div(columns + N, 16);
  return (lines | 1) * 16;
}

// Rows in the form that rounded weights want: bytes with a scale and a zero point a row for int8, bfloat16 alone for
// bf16. What stands behind a row's columns, up to whole vectors, meets weights of zero.
struct Bytes {
  uint8_t* values;  // [rows, ld]
  float* scales;    // [rows]
  int32_t* zeros;   // [rows]
  int64_t ld;
};

inline int64_t panel_count(int64_t n) { return ceil_div(n, N); }

// Vectors in panel p of n outputs.
inline int64_t panel_vectors(int64_t n, int64_t p) { return min(NV, ceil_div(n - p * N, W)); }

inline int64_t packed_size(int64_t n, int64_t k) { return round_up(n, W) * (k + 1); }

inline const float* panel(const Matrix& w, int64_t p) {
  return static_cast<const float*>(w.panels) + p * N * (w.k + 1);
}

inline void pack(const float* weight, const float* bias, int64_t n, int64_t k, float* panels) {
  for (int64_t first = 0; first < n; first += N) {
    const int64_t width = panel_vectors(n, first / N) * W;
    const int64_t used = min(width, n - first);
    for (int64_t j = 0; j < width; ++j) panels[j] = (bias != nullptr && j < used) ? bias[first + j] : 0.0f;
    panels += width;
    for (int64_t i = 0; i < k; ++i, panels += width)
      for (int64_t j = 0; j < width; ++j) panels[j] = j < used ? weight[(first + j) * k + i] : 0.0f;
  }
}

// What to bring into the second-level cache while a tile is computed: `step` words of 4 bytes on for each step of k.
struct Ahead {
  const void* place;
  int64_t step;

  void fetch(int64_t k) const { __builtin_prefetch(static_cast<const int32_t*>(place) + k * step, 0, 2); }
};

// c[0:Rows, 0:Vecs*W] = init + a[0:Rows, 0:k] b[0:k, 0:Vecs*W]
template <int64_t Rows, int64_t Vecs>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t k, float* c, int64_t ldc,
          Ahead ahead) {
  Vec acc[Rows][Vecs];
#pragma GCC unroll 32
  for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) acc[i][v] = load(init + v * W);
#pragma GCC unroll 4
  for (int64_t kk = 0; kk < k; ++kk, b += ldb) {
    ahead.fetch(kk);
    Vec row[Vecs];
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 32
    for (int64_t i = 0; i < Rows; ++i) {
      const Vec x = splat(a[i * lda + kk]);
#pragma GCC unroll 32
      for (int64_t v = 0; v < Vecs; ++v) acc[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 32
  for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) store(c + i * ldc + v * W, acc[i][v]);
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, Ahead);

struct TileTable {
  Tile of[M + 1][NV + 1];
};

template <int64_t Rows, int64_t Vecs>
constexpr void fill(TileTable& table) {
  table.of[Rows][Vecs] = tile<Rows, Vecs>;
  if constexpr (Vecs > 1) {
    fill<Rows, Vecs - 1>(table);
  } else if constexpr (Rows > 1) {
    fill<Rows - 1, NV>(table);
  }
}

constexpr TileTable make_tiles() {
  TileTable table{};
  fill<M, NV>(table);
  return table;
}

constexpr TileTable kTiles = make_tiles();

alignas(64) constexpr float kZeros[N] = {};

// Splits `total` into `parts` ranges whose sizes differ by at most one: no small last tile that would leave the
// multiply-add pipes idle, no last row block that one worker finishes long before the others.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

// For each tile of a[0:rows, 0:k] W^T + b: calls emit(first row, rows, first column, columns, tile) with tile[i * N + j].
// Panels outside, rows inside: a panel is read from memory once for the block and then comes from cache. Each tile
// brings its share of the next panel nearer; the hardware would not, because it stops prefetching at every 4 KB page.
// After the last panel that is whatever stands behind it: the next matrix of the same sublayer.
template <class Emit>
inline void multiply(const float* a, int64_t lda, int64_t rows, const Matrix& w, int64_t first_panel,
                     int64_t last_panel, const Emit& emit) {
  alignas(64) float c[M * N];
  const int64_t tiles = ceil_div(rows, M);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const float* b = panel(w, p);
    const int64_t vectors = panel_vectors(w.n, p);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r0 = part_begin(rows, tiles, t), r1 = part_begin(rows, tiles, t + 1);
      const Ahead ahead = {b + vectors * W * (w.k + 1) + part_begin(w.k * N, tiles, t), ceil_div(N, tiles)};
      kTiles.of[r1 - r0][vectors](a + r0 * lda, lda, b + vectors * W, vectors * W, b, w.k, c, N, ahead);
      emit(r0, r1 - r0, p * N, min(N, w.n - p * N), c);
    }
  }
}

}  // namespace gohsp::GOHSP_ISA
