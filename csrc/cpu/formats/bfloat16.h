// SPDX-License-Identifier: Apache-2.0
// Weights in bfloat16, for the tile registers of AMX.
//
// Weights and activations are rounded to bfloat16, to the nearest and to even on a tie; products add up in fp32 from
// the bias on. The words of a panel are pairs of inputs, and 16 rows of 16 words are what AMX calls a tile: its B
// operand, read where it lies.
//
// Inputs are padded to two whole vectors with zeros in weights and rows alike. Other instruction sets run the same
// arithmetic in plain vectors, for tests of it; they gain nothing by it.
#pragma once

#include "format.h"

namespace gohsp::GOHSP_ISA {

constexpr int64_t kTileRows = 16;              // of a tile register; each holds 64 bytes
constexpr int64_t kBlockRows = 2 * kTileRows;  // rows of a product that are computed together

inline int64_t padded_inputs(int64_t k) { return round_up(max(k, 1), 2 * W); }

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

// y[i, j] = the pair of x[2 i, j] and x[2 i + 1, j] for `pairs` rows of y; zero past the rows of x. The right side of a
// block from floats; x and y may overrun a row by less than a vector.
inline void pair_rows(const float* x, int64_t ldx, int64_t rows, int64_t columns, int64_t pairs, float* y,
                      int64_t ldy) {
  for (int64_t i = 0; i < pairs; ++i)
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
  for (int64_t j = 0; j < padded_inputs(columns); j += 2 * W)
    round_to_bf16(load(x + j), load(x + j + W), to.values + i * to.ld + 2 * j);
}

#if GOHSP_LANES == 16 && defined(__AMX_BF16__)
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

// c[0:32, 0:16 * vectors] = init + a[0:32] b, where b is `steps` times 16 rows of pairs: two tiles of rows times one or
// two of outputs, four accumulators for two and two loads. Rows past the last one of a product are computed from whatever is there; nobody reads them.
// beside(step) is other work: a step of 64 cycles takes the tiles, but hardly anything else of the core.
template <class Beside>
inline void amx_block(const uint8_t* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t vectors,
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
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (two) {
      _tile_loadd(7, b + W, 4 * ldb);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
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

template <class Beside>
inline void amx_block(const uint8_t* a, int64_t lda, const float* b, int64_t ldb, const float* init, int64_t vectors,
                      int64_t steps, float* c, int64_t ldc, const Beside& beside) {
  for (int64_t s = 0; s < steps; ++s) beside(s);
  for (int64_t i = 0; i < kBlockRows; ++i)
    for (int64_t j = 0; j < vectors * W; j += W) {
      Vec sum = load(init + j);
      for (int64_t pair = 0; pair < steps * W; ++pair) {
        const IntVec x = splat_ints(a + i * lda + 4 * pair), w = float_as_bits(load(b + pair * ldb + j));
        sum += bits_as_float(x << 16) * bits_as_float(w << 16);
        sum += bits_as_float(x & ~0xffff) * bits_as_float(w & ~0xffff);
      }
      store(c + i * ldc + j, sum);
    }
}
#endif

// A block's results on their way out.
struct Finished {
  int64_t row, rows, column, columns;
  float* c;
};

struct BFloat16 {
  static constexpr Format kFormat = Format::bfloat16;
  static constexpr int64_t kHead = 1;  // biases
  static constexpr bool kZeroed = true;
  using Rows = RoundedRows;

  static int64_t depth(int64_t k) { return padded_inputs(k) / 2; }
  static const Rows& of(const Lhs& lhs) { return lhs.rounded; }
  static int64_t row_bytes(int64_t k) { return 2 * padded_inputs(k); }
  static void round_row(float* x, int64_t columns, const RoundedRows& to, int64_t i) { narrow_row(x, columns, to, i); }

  static void pack_panel(const Unpacked& from, int64_t first, int64_t used, int64_t width, int32_t* to) {
    const uint16_t* weight = static_cast<const uint16_t*>(from.weight) + first * from.k;
    if (from.bias != nullptr) __builtin_memcpy(to, from.bias + first, static_cast<size_t>(used) * sizeof(float));
    char* pairs = reinterpret_cast<char*>(to + width);
    for (int64_t i = 0; i < from.k; ++i)
      for (int64_t j = 0; j < used; ++j)
        __builtin_memcpy(pairs + 4 * (i / 2 * width + j) + 2 * (i % 2), weight + j * from.k + i, sizeof(uint16_t));
  }

  // As multiply in format.h, a block at a time. Rows are there up to a multiple of kBlockRows. Results are emitted a few rows
  // at a time while the next block is computed, and so is its share of the next panel fetched.
  template <class Emit>
  static void multiply(const Rows& a, int64_t rows, const Matrix& w, int64_t first_panel, int64_t last_panel,
                       const Emit& emit) {
    alignas(64) float c[2][kBlockRows * N];
    const int64_t blocks = ceil_div(rows, kBlockRows), steps = depth(w.k) / W;
    const int64_t rows_a_step = ceil_div(kBlockRows, steps);
    Finished before = {};
    const auto emit_rows = [&](int64_t begin, int64_t end) {
      if (begin < end) emit(before.row + begin, end - begin, before.column, before.columns, before.c + begin * N);
    };
    int64_t turn = 0;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      const float* bias = reinterpret_cast<const float*>(panel<BFloat16>(w, p));
      const int64_t vectors = panel_vectors(w.n, p);
      const float* next = bias + vectors * W * (1 + steps * W);
      for (int64_t t = 0; t < blocks; ++t, turn = 1 - turn) {
        const int64_t r0 = t * kBlockRows, lines = ceil_div(N * W, 16 * blocks);
        amx_block(a.values + r0 * a.ld, a.ld, bias + vectors * W, vectors * W, bias, vectors, steps, c[turn], N,
                  [&](int64_t s) {
                    for (int64_t i = 0; i < lines; ++i)
                      __builtin_prefetch(next + 16 * ((t * steps + s) * lines + i), 0, 2);
                    emit_rows(s * rows_a_step, min(before.rows, (s + 1) * rows_a_step));
                  });
        before = {r0, min(kBlockRows, rows - r0), p * N, min(N, w.n - p * N), c[turn]};
      }
    }
    emit_rows(0, before.rows);
  }
};

}  // namespace gohsp::GOHSP_ISA
