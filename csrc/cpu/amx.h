// SPDX-License-Identifier: Apache-2.0
// Products on the tile registers of AMX, for the formats whose words they take.
//
// A register holds 16 rows of 16 words, and 16 rows of a panel are what AMX calls a B operand, read where they lie. A
// block is 32 rows and up to 32 outputs: two tiles of rows times one or two of outputs, four accumulators for two and
// two loads. Rows past the last one of a product are computed from whatever is there; nobody reads them.
//
// Instruction sets with GOHSP_TILE_REGISTERS use this text. Compiled without AMX it runs in plain vectors, for tests.
#pragma once

#include "formats/format.h"

namespace gohsp::GOHSP_ISA {

#if defined(GOHSP_TILE_REGISTERS)

constexpr bool kHasTiles = true;
constexpr int64_t kTileRows = 16;              // of a tile register; each holds 64 bytes
constexpr int64_t kBlockRows = 2 * kTileRows;  // rows of a product that are computed together

// Words of a row that a step of a product takes.
inline int64_t whole_steps(int64_t words) { return round_up(max(words, 1), kTileRows); }

#if defined(__AMX_TILE__)
struct alignas(64) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];  // of a row, for each register
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Holds the tile registers of the calling thread in the shape of these kernels. Whoever else uses them, such as torch's
// own products, does the same: nothing is expected of them before, nothing is left in them after.
class AmxTiles {
 public:
  explicit AmxTiles(bool wanted) : held_(wanted) {
    if (held_) _tile_loadconfig(&kTileConfig);
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() {
    if (held_) _tile_release();
  }

 private:
  bool held_;
};

// The four products of a step, by place in the block. The intrinsics take literal numbers of registers.
#define GOHSP_TILE_PRODUCTS(product)              \
  static void top_left() { product(0, 4, 6); }    \
  static void bottom_left() { product(1, 5, 6); } \
  static void top_right() { product(2, 4, 7); }   \
  static void bottom_right() { product(3, 5, 7); }
struct PairProducts {
  GOHSP_TILE_PRODUCTS(_tile_dpbf16ps)
};
struct ByteProducts {
  GOHSP_TILE_PRODUCTS(_tile_dpbusd)
};
#undef GOHSP_TILE_PRODUCTS

// c[0:32, 0:16 * vectors] = init + a[0:32] b, where b is `steps` times 16 rows of words.
// beside(step) is other work: a step of 64 cycles takes the tiles, but hardly anything else of the core.
template <class Products, class Beside>
inline void tile_block(const uint8_t* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t vectors,
                       int64_t steps, float* c, int64_t ldc, const Beside& beside) {
  const bool two = vectors == 2;
  asm volatile("" ::: "memory");  // to GCC a tile load reads no memory, so stores could move behind it
  _tile_loadd(0, init, 0);
  _tile_loadd(1, init, 0);
  if (two) {
    _tile_loadd(2, init + W, 0);
    _tile_loadd(3, init + W, 0);
  }
  for (int64_t s = 0; s < steps; ++s, a += 4 * W, b += kTileRows * ldb) {
    _tile_loadd(4, a, lda);
    _tile_loadd(5, a + kTileRows * lda, lda);
    _tile_loadd(6, b, 4 * ldb);
    Products::top_left();
    Products::bottom_left();
    if (two) {
      _tile_loadd(7, b + W, 4 * ldb);
      Products::top_right();
      Products::bottom_right();
    }
    beside(s);
  }
  _tile_stored(0, c, 4 * ldc);
  _tile_stored(1, c + kTileRows * ldc, 4 * ldc);
  if (two) {
    _tile_stored(2, c + W, 4 * ldc);
    _tile_stored(3, c + kTileRows * ldc + W, 4 * ldc);
  }
}

#else
struct AmxTiles {
  explicit AmxTiles(bool) {}
};

struct PairProducts {
  static Vec dot(Vec sum, Vec x, Vec w) { return dot2(sum, x, w); }
};
struct ByteProducts {
  static Vec dot(Vec sum, Vec x, Vec w) { return (Vec)dot4((IntVec)sum, (IntVec)x, (IntVec)w); }
};

template <class Products, class Beside>
inline void tile_block(const uint8_t* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t vectors,
                       int64_t steps, float* c, int64_t ldc, const Beside& beside) {
  for (int64_t s = 0; s < steps; ++s) beside(s);
  for (int64_t i = 0; i < kBlockRows; ++i)
    for (int64_t j = 0; j < vectors * W; j += W) {
      Vec sum = load(init + j);
      for (int64_t word = 0; word < steps * kTileRows; ++word)
        sum = Products::dot(sum, bits_as_float(splat_ints(a + i * lda + 4 * word)), load(b + word * ldb + j));
      store(c + i * ldc + j, sum);
    }
}
#endif

// A block's results on their way out.
struct Finished {
  int64_t row, rows, column, columns;
  const int32_t* head;
  int64_t vectors;
  float* c;
};

// As multiply in product.h, a block at a time, for a format with TileProducts. Rows are there up to a multiple of
// kBlockRows. Results are finished and emitted a few rows at a time while the next block is computed, and so is its share
// of the next panel fetched.
template <class F, class Emit>
void multiply_blocks(const RoundedRows& a, int64_t rows, const Matrix& w, int64_t first_panel, int64_t last_panel,
                     const Emit& emit) {
  alignas(64) float c[2][kBlockRows * N];
  const int64_t blocks = ceil_div(rows, kBlockRows), depth = F::depth(w.k), steps = depth / kTileRows;
  const int64_t rows_a_step = ceil_div(kBlockRows, steps);
  Finished before = {};
  const auto emit_rows = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    float* from = before.c + begin * N;
    F::finish(a, before.row + begin, end - begin, before.head, before.vectors, from);
    emit(before.row + begin, end - begin, before.column, before.columns, from);
  };
  int64_t turn = 0;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int32_t* head = panel<F>(w, p);
    const int64_t vectors = panel_vectors(w.n, p), width = vectors * W;
    const float* words = reinterpret_cast<const float*>(head + width * F::kHead);
    const float* next = words + width * depth;
    for (int64_t t = 0; t < blocks; ++t, turn = 1 - turn) {
      const int64_t r0 = t * kBlockRows, lines = ceil_div(N * W, 16 * blocks);
      tile_block<typename F::TileProducts>(a.values + r0 * a.ld, a.ld, words, width, F::start(head), vectors, steps,
                                           c[turn], N, [&](int64_t s) {
                                             for (int64_t i = 0; i < lines; ++i)
                                               __builtin_prefetch(next + 16 * ((t * steps + s) * lines + i), 0, 2);
                                             emit_rows(s * rows_a_step, min(before.rows, (s + 1) * rows_a_step));
                                           });
      before = {r0, min(kBlockRows, rows - r0), p * N, min(N, w.n - p * N), head, vectors, c[turn]};
    }
  }
  emit_rows(0, before.rows);
}

#else

constexpr bool kHasTiles = false;
constexpr int64_t kBlockRows = M;

struct AmxTiles {
  explicit AmxTiles(bool) {}
};

inline int64_t whole_steps(int64_t words) { return words; }

#endif

}  // namespace gohsp::GOHSP_ISA
