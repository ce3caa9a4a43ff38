// SPDX-License-Identifier: Apache-2.0
// The weight formats, and products with matrices of any of them.
#pragma once

#include "amx.h"
#include "formats/bfloat16.h"
#include "formats/float32.h"
#include "formats/int8.h"

namespace gohsp::GOHSP_ISA {

// body(F{}) with the format of these weights.
template <class Body>
inline auto with_format(Format format, const Body& body) {
#define GOHSP_FORMAT(name, type, ...) \
  case Format::name: return body(type{});
  switch (format) { GOHSP_FORMATS(GOHSP_FORMAT) }
#undef GOHSP_FORMAT
  __builtin_unreachable();
}

// For each tile of a[0:rows] W^T + b in panels [first_panel, last_panel): calls
// emit(first row, rows, first column, columns, tile) with tile[i * N + j].
// Panels outside, rows inside: a panel is read from memory once for the block and then comes from cache. Each tile
// brings its share of the next panel nearer; the hardware would not, because it stops prefetching at every 4 KB page.
// After the last panel that is whatever stands behind it: the next matrix of the same sublayer.
template <class F, class Emit>
void multiply(const typename F::Rows& a, int64_t rows, const Matrix& w, int64_t first_panel, int64_t last_panel,
              const Emit& emit) {
  if constexpr (!requires { typename F::Tile; }) {
    multiply_blocks<F>(a, rows, w, first_panel, last_panel, emit);
  } else {
    alignas(64) float c[M * N];
    const int64_t tiles = ceil_div(rows, M), depth = F::depth(w.k);
    for (int64_t p = first_panel; p < last_panel; ++p) {
      const int32_t* head = panel<F>(w, p);
      const int64_t vectors = panel_vectors(w.n, p);
      const int32_t* next = head + vectors * W * (F::kHead + depth);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t r0 = part_begin(rows, tiles, t), r1 = part_begin(rows, tiles, t + 1);
        const Prefetch prefetch = {next + part_begin(depth * N, tiles, t), ceil_div(N, tiles)};
        F::run(kTiles<F>.of[r1 - r0][vectors], a, r0, head, vectors, depth, c, prefetch);
        emit(r0, r1 - r0, p * N, min(N, w.n - p * N), c);
      }
    }
  }
}

inline int64_t packed_bytes(Format format, int64_t n, int64_t k) {
  return with_format(format, [=](auto f) { return packed_bytes<decltype(f)>(n, k); });
}

inline void pack(Format format, const Unpacked& from, void* panels) {
  with_format(format, [&](auto f) { pack<decltype(f)>(from, panels); });
}

// Whether queries, keys and values beside these weights meet as pairs of bfloat16 numbers.
inline bool attends_in_pairs(Format format) {
  return with_format(format, [](auto f) {
    if constexpr (requires { decltype(f)::kAttendsInPairs; }) return decltype(f)::kAttendsInPairs;
    return false;
  });
}

// From one rounded row of k columns to the next, in bytes: whole vectors, and an odd number of cache lines.
inline int64_t rounded_stride(Format format, int64_t k) {
  return with_format(format, [=](auto f) -> int64_t {
    if constexpr (Rounding<decltype(f)>) return (ceil_div(f.row_bytes(k), 64) | 1) * 64;
    return 0;
  });
}

// Row i of `to` = x[0:columns], rounded for these weights. Two vectors of x behind its columns are overwritten.
inline void round_row(Format format, float* x, int64_t columns, const RoundedRows& to, int64_t i) {
  with_format(format, [&](auto f) {
    if constexpr (Rounding<decltype(f)>) f.round_row(x, columns, to, i);
  });
}

inline bool rounds_tiles(Format format) {
  return with_format(format, [](auto f) { return RoundingTiles<decltype(f)>; });
}

// c[0:rows, 0:columns] of a product, rounded into rows and columns from (row, column) on for weights of this format. What is
// in c behind its columns is overwritten.
inline void round_tile(Format format, float* c, int64_t rows, int64_t columns, const RoundedRows& to, int64_t row,
                       int64_t column) {
  with_format(format, [&](auto f) {
    if constexpr (RoundingTiles<decltype(f)>) f.round_tile(c, rows, columns, to, row, column);
  });
}

template <class Emit>
inline void multiply(const Lhs& a, int64_t rows, const Matrix& w, const Emit& emit) {
  with_format(w.format, [&](auto f) { multiply<decltype(f)>(f.of(a), rows, w, 0, panel_count(w.n), emit); });
}

}  // namespace gohsp::GOHSP_ISA
