// SPDX-License-Identifier: Apache-2.0
// What all weight formats share: panels of words, packing, and the table of tiles.
//
// A weight matrix [n, k] is packed into panels of N = NV * W outputs. A panel is rows of one word of 4 bytes an output:
// a head (biases, and what else the format needs an output), then the weights, as many inputs to a word as fit. The
// kernel starts its accumulators from the head and reads straight on. The last panel is as narrow as whole vectors
// allow: a ragged n costs at most W - 1 idle lanes, not a panel.
//
// A format is a struct that has
//
//   kFormat                  its number (csrc/common/wire.h)
//   kHead, depth(k)          rows of words of a panel before its weights, and of weights for k inputs
//   kZeroed                  whether pack_panel writes only what is not zero
//   pack_panel(from, first, used, width, to)
//                            a panel of `width` outputs, of which `used` from `first` on are the matrix's
//   Rows, of(lhs)            the left side of a product in the form that its tiles read
//   Tile, tile<Rows, Vecs>   the micro-kernel: Rows x Vecs vectors of the result; float_tile below is one
//   run(tile, ...)           a call of one
//
// and, where rows are rounded for it, round_row and row_bytes, and, where an element needs no other one to be rounded,
// round_tile for results that the next product reads. Where its products are those of tile registers, it has
// TileProducts, start and finish (see amx.h) instead of Tile, tile and run. kAttendsInPairs says, where it is there, that
// queries, keys and values beside such weights meet as pairs of bfloat16 numbers. product.h lists the formats.
#pragma once

#include "../kernels.h"
#include "../simd.h"

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

// Splits `total` into `parts` ranges whose sizes differ by at most one: no small last tile that would leave the
// multiply-add pipes idle, no last row block that one worker finishes long before the others.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

struct FloatRows {
  const float* values;  // [rows, ld]
  int64_t ld;
};

// Rows in the form that rounded weights want: bytes with a scale and a zero point a row for int8, bfloat16 alone for
// bfloat16. What stands behind a row's columns, up to whole vectors, meets weights of zero.
struct RoundedRows {
  uint8_t* values;  // [rows, ld]
  float* scales;    // [rows]
  int32_t* zeros;   // [rows]
  int64_t ld;       // bytes
};

// The left side of a product: floats, or what rounded weights want.
struct Lhs {
  FloatRows floats = {};
  RoundedRows rounded = {};

  Lhs(const float* values, int64_t ld) : floats{values, ld} {}
  explicit Lhs(const RoundedRows& rows) : rounded(rows) {}
};

// What to bring into the second-level cache while a tile is computed: `step` words on for each step of its depth.
struct Prefetch {
  const void* place;
  int64_t step;

  void fetch(int64_t k) const { __builtin_prefetch(static_cast<const int32_t*>(place) + k * step, 0, 2); }
};

inline int64_t panel_count(int64_t n) { return ceil_div(n, N); }

// Vectors in panel p of n outputs.
inline int64_t panel_vectors(int64_t n, int64_t p) { return min(NV, ceil_div(n - p * N, W)); }

template <class F>
concept Rounding = requires { &F::round_row; };

template <class F>
concept RoundingTiles = requires { &F::round_tile; };

template <class F>
int64_t packed_bytes(int64_t n, int64_t k) {
  return 4 * round_up(n, W) * (F::kHead + F::depth(k));
}

// Panel p, and what follows the last one.
template <class F>
const int32_t* panel(const Matrix& w, int64_t p) {
  return static_cast<const int32_t*>(w.panels) + p * N * (F::kHead + F::depth(w.k));
}

template <class F>
void pack(const Unpacked& from, void* panels) {
  int32_t* to = static_cast<int32_t*>(panels);
  for (int64_t first = 0; first < from.n; first += N) {
    const int64_t width = panel_vectors(from.n, first / N) * W, words = width * (F::kHead + F::depth(from.k));
    if constexpr (F::kZeroed) __builtin_memset(to, 0, static_cast<size_t>(words) * sizeof(int32_t));
    F::pack_panel(from, first, min(width, from.n - first), width, to);
    to += words;
  }
}

// The tiles of a format, by rows and vectors.
template <class F>
struct TileTable {
  typename F::Tile of[M + 1][NV + 1];
};

template <class F, int64_t Rows, int64_t Vecs>
constexpr void fill(TileTable<F>& table) {
  table.of[Rows][Vecs] = F::template tile<Rows, Vecs>;
  if constexpr (Vecs > 1) {
    fill<F, Rows, Vecs - 1>(table);
  } else if constexpr (Rows > 1) {
    fill<F, Rows - 1, NV>(table);
  }
}

template <class F>
constexpr TileTable<F> make_tiles() {
  TileTable<F> table{};
  fill<F, M, NV>(table);
  return table;
}

template <class F>
constexpr TileTable<F> kTiles = make_tiles<F>();

// The tile of formats whose products add up in fp32: c[0:Rows, 0:Vecs*W] = init + a[0:Rows, 0:depth] b[0:depth, 0:Vecs*W],
// word by word.
using FloatTile = void (*)(const float* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t depth,
                           float* c, int64_t ldc, Prefetch prefetch);

template <class F, int64_t Rows, int64_t Vecs>
void float_tile(const float* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t depth, float* c,
                int64_t ldc, Prefetch prefetch) {
  Vec acc[Rows][Vecs];
#pragma GCC unroll 32
  for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) acc[i][v] = load(init + v * W);
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    prefetch.fetch(k);
    Vec row[Vecs];
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 32
    for (int64_t i = 0; i < Rows; ++i) {
      const Vec x = F::spread(a + i * lda + k);
#pragma GCC unroll 32
      for (int64_t v = 0; v < Vecs; ++v) acc[i][v] = F::multiply_add(acc[i][v], x, row[v]);
    }
  }
#pragma GCC unroll 32
  for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 32
    for (int64_t v = 0; v < Vecs; ++v) store(c + i * ldc + v * W, acc[i][v]);
}

alignas(64) constexpr float kZeros[N] = {};

}  // namespace gohsp::GOHSP_ISA
