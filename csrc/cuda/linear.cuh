// SPDX-License-Identifier: Apache-2.0
// The packed linear layer: rows of x, their pruned columns left out, times a packed weight; LayerNorm, bias,
// activation, layer scale, residual and scatter on the way out.
//
// A block computes BM x BN results. Chunks of 16 bytes of x and of the weight travel from memory to shared memory by
// asynchronous copies, kStages - 1 steps of the depth ahead of the tensor cores; ldmatrix hands them out as fragments.
// Columns of x are gathered by the chunk: a list says which chunks of a row have kept columns, and the weight is zero
// at the others in them. Each result has one writer, as output columns are disjoint: no atomics, same result each run.
//
// LayerNorm is applied to the results, by linearity, its affine part being folded into weight and bias:
//     norm(x) W^T = (x W^T - mean * rowsum(W)) / std
// so x enters the tensor cores as it is in memory, where a normalised operand would have been rounded once more. The
// statistics are given, or the block computes those of its rows while the first copies travel.
#pragma once

#include "rows.cuh"

namespace gohsp::cuda {

template <class Op_, int BM_, int BN_, int WARPS_M_, int WARPS_N_, int BLOCKS_>
struct LinearTile {
  using Op = Op_;
  static constexpr int BM = BM_, BN = BN_;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
  static constexpr int BLOCKS = BLOCKS_;  // of a multiprocessor, that registers must leave room for
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // results of a warp
  static constexpr int STAGES = 4;
  static constexpr int CHUNKS = 4;  // of 16 bytes: depth of a step
  static constexpr int STAGE_BYTES = (BM + BN) * CHUNKS * kChunkBytes;
  static constexpr int STATISTICS = STAGES * STAGE_BYTES;  // where those of the block's rows lie
  static constexpr int SHARED_BYTES = STATISTICS + BM * static_cast<int>(sizeof(Float2));
  // Results pass through shared memory 16 rows at a time. 72: the 8 rows of a store fall into different banks.
  static constexpr int OUT_STRIDE = 72, OUT_BYTES = 16 * OUT_STRIDE * static_cast<int>(sizeof(float));
  static_assert(WN == 64, "a lane has two columns of the way out");
  static_assert(THREADS / 32 * OUT_BYTES <= STATISTICS);
  static_assert(BM * CHUNKS % THREADS == 0 && BN * CHUNKS % THREADS == 0);
};

// Where chunk `chunk` of row `row` lies in a stage. Two rows fill 128 bytes; the order within turns every two rows, so
// that 8 rows at one chunk, which ldmatrix reads together, lie in different banks.
GOHSP_DEVICE uint32_t linear_chunk(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }

GOHSP_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + erf_exact(x * 0.70710678f));
    case Activation::gelu_tanh: return x / (1.0f + exp_fast(-1.59576912f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    case Activation::silu: return x / (1.0f + exp_fast(-x));
    case Activation::quick_gelu: return x / (1.0f + exp_fast(-1.702f * x));
    default: return x;
  }
}

// The copies of a block: which chunks of x and of the weight this thread brings.
template <class Tile>
struct LinearLoader {
  static constexpr int ROWS = Tile::THREADS / Tile::CHUNKS;  // that one round of all threads brings
  static constexpr int A = Tile::BM / ROWS, B = Tile::BN / ROWS;
  const LinearParams& p;
  const char* a[A];
  const char* b[B];
  bool a_ok[A], b_ok[B];
  int row, chunk;

  GOHSP_DEVICE LinearLoader(const LinearParams& params, int64_t first_row, int first_n) : p(params) {
    row = thread_index() / Tile::CHUNKS;
    chunk = thread_index() % Tile::CHUNKS;
    const int64_t element = sizeof(typename Tile::Op::Element);
    GOHSP_UNROLL
    for (int i = 0; i < A; ++i) {
      const int64_t r = first_row + row + i * ROWS;
      a_ok[i] = r < p.rows;
      a[i] = static_cast<const char*>(p.x) + (a_ok[i] ? r * p.x_stride * element : 0);
    }
    GOHSP_UNROLL
    for (int i = 0; i < B; ++i) {
      const int n = first_n + row + i * ROWS;
      b_ok[i] = n < p.n;
      b[i] = static_cast<const char*>(p.weight) + (b_ok[i] ? static_cast<int64_t>(n) * p.chunks * kChunkBytes : 0);
    }
  }

  GOHSP_DEVICE void bring(int step, int stage) const {
    const int place = step * Tile::CHUNKS + chunk;  // in the depth
    const bool inside = place < p.chunks;
    int64_t source = inside ? place : 0;
    if (inside && p.in_chunks != nullptr) source = load_global(p.in_chunks + place);
    const uint32_t base = stage * Tile::STAGE_BYTES;
    GOHSP_UNROLL
    for (int i = 0; i < A; ++i)
      copy_async(base + linear_chunk(row + i * ROWS, chunk), a[i] + source * kChunkBytes, inside && a_ok[i]);
    GOHSP_UNROLL
    for (int i = 0; i < B; ++i)
      copy_async(base + linear_chunk(Tile::BM + row + i * ROWS, chunk),
                 b[i] + (inside ? static_cast<int64_t>(place) * kChunkBytes : 0), inside && b_ok[i]);
  }
};

// One step of the depth on one stage: this warp's WM x WN results.
template <class Tile>
GOHSP_DEVICE void linear_step(float acc[Tile::WM / 16][Tile::WN / 8][4], int stage, int warp_m, int warp_n) {
  const int lane = thread_index() % 32;
  const uint32_t base = stage * Tile::STAGE_BYTES;
  GOHSP_UNROLL
  for (int half = 0; half < Tile::CHUNKS / 2; ++half) {
    uint32_t a[Tile::WM / 16][4];
    GOHSP_UNROLL
    for (int i = 0; i < Tile::WM / 16; ++i)
      load_matrices(a[i], base + linear_chunk(warp_m * Tile::WM + i * 16 + lane % 16, 2 * half + lane / 16));
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WN / 16; ++j) {
      uint32_t b[4];  // two fragments of 8 columns
      const int n = Tile::BM + warp_n * Tile::WN + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b, base + linear_chunk(n, 2 * half + lane / 8 % 2));
      GOHSP_UNROLL
      for (int i = 0; i < Tile::WM / 16; ++i) {
        Tile::Op::multiply(acc[i][2 * j], a[i], b[0], b[1]);
        Tile::Op::multiply(acc[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// What the results of one column go through.
struct LinearColumn {
  float bias = 0.0f, row_sum = 0.0f, scale = 1.0f;
  int column = 0;  // in out
  bool ok = false, computed = false;

  GOHSP_DEVICE LinearColumn(const LinearParams& p, int n, int last) {
    ok = n < last;
    computed = ok && n < p.n;
    if (computed && p.bias != nullptr) bias = load_global(p.bias + n);
    if (computed && p.row_sum != nullptr) row_sum = load_global(p.row_sum + n);
    if (computed && p.scale != nullptr) scale = load_global(p.scale + n);
    if (ok) column = p.out_columns == nullptr ? n : load_global(p.out_columns + n);
  }

  GOHSP_DEVICE float finish(const LinearParams& p, float x, Float2 statistics) const {
    if (!computed) return 0.0f;
    return scale * activate((x - statistics.x * row_sum) * statistics.y + bias, p.activation);
  }
};

// Adds the residual of one row to two results and stores them.
template <class T>
GOHSP_DEVICE void linear_store(const LinearParams& p, int64_t row, float x, float y, const LinearColumn& first,
                               const LinearColumn& second) {
  const int64_t from = (p.queries == p.tokens ? row : row / p.queries * p.tokens + row % p.queries) * p.out_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const T* residual = static_cast<const T*>(p.residual) + (p.residual == nullptr ? 0 : from);
  if (p.paired && second.ok) {
    if (p.residual != nullptr) {
      const Pair<T> add = load_global(reinterpret_cast<const Pair<T>*>(residual + first.column));
      x += to_float(add.x);
      y += to_float(add.y);
    }
    store_global(reinterpret_cast<Pair<T>*>(out + first.column), Pair<T>{from_float<T>(x), from_float<T>(y)});
    return;
  }
  if (first.ok) {
    if (p.residual != nullptr) x += to_float(load_global(residual + first.column));
    store_global(out + first.column, from_float<T>(x));
  }
  if (second.ok) {
    if (p.residual != nullptr) y += to_float(load_global(residual + second.column));
    store_global(out + second.column, from_float<T>(y));
  }
}

template <class Tile>
GOHSP_KERNEL(Tile::THREADS, Tile::BLOCKS)
linear_kernel(const LinearParams p) {
  using T = typename Tile::Op::Element;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int warp_m = warp / Tile::WARPS_N, warp_n = warp % Tile::WARPS_N;
  // Tiles of one range of rows are neighbours, so they run together and share those rows in the L2 cache. Behind the
  // tiles with a product come those of the columns that nothing is added to, unless these are in place already.
  const int tiles_computed = divide_up(p.n, Tile::BN);
  const int tiles = tiles_computed + (p.out == p.residual ? 0 : divide_up(p.out_features - p.n, Tile::BN));
  const int tile_n = static_cast<int>(block_index() % tiles);
  const int64_t first_row = block_index() / tiles * Tile::BM;
  const bool computed = tile_n < tiles_computed;
  const int first_n = computed ? tile_n * Tile::BN : p.n + (tile_n - tiles_computed) * Tile::BN;
  const int last_n = computed ? p.n : p.out_features;
  const int steps = computed ? divide_up(p.chunks, Tile::CHUNKS) : 0;

  const LinearLoader<Tile> loader(p, first_row, first_n);
  GOHSP_UNROLL
  for (int step = 0; step < Tile::STAGES - 1; ++step) {
    if (step < steps) loader.bring(step, step);
    commit();
  }

  if (computed && p.row_sum != nullptr) {
    for (int r = warp; r < Tile::BM; r += Tile::THREADS / 32) {
      const int64_t row = first_row + r;
      Float2 statistics{0.0f, 0.0f};
      if (row < p.rows)
        statistics = p.statistics != nullptr
                         ? load_global(p.statistics + row)
                         : row_statistics(static_cast<const T*>(p.x) + row * p.x_stride, p.features, true, p.eps);
      if (lane == 0) store_shared(Tile::STATISTICS + r * 8, statistics);
    }
  }

  float acc[Tile::WM / 16][Tile::WN / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<Tile::STAGES - 2>();
    barrier();  // this step has arrived for all, and all are done with the one before, whose stage is filled next
    const int next = step + Tile::STAGES - 1;
    if (next < steps) loader.bring(next, next % Tile::STAGES);
    commit();
    linear_step<Tile>(acc, step % Tile::STAGES, warp_m, warp_n);
  }
  wait_copies<0>();
  barrier();

  const int n = first_n + warp_n * Tile::WN + 2 * lane;
  const LinearColumn first(p, n, last_n), second(p, n + 1, last_n);
  const uint32_t out = warp * Tile::OUT_BYTES;
  GOHSP_UNROLL
  for (int i = 0; i < Tile::WM / 16; ++i) {
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WN / 8; ++j) {
      const uint32_t place = out + (lane / 4 * Tile::OUT_STRIDE + j * 8 + lane % 4 * 2) * 4;
      store_shared(place, Float2{acc[i][j][0], acc[i][j][1]});
      store_shared(place + 8 * Tile::OUT_STRIDE * 4, Float2{acc[i][j][2], acc[i][j][3]});
    }
    warp_barrier();
    for (int r = 0; r < 16; ++r) {
      const int in_tile = warp_m * Tile::WM + i * 16 + r;
      const int64_t row = first_row + in_tile;
      if (row >= p.rows) break;
      const Float2 x = load_shared<Float2>(out + (r * Tile::OUT_STRIDE + 2 * lane) * 4);
      Float2 statistics{0.0f, 1.0f};
      if (computed && p.row_sum != nullptr) statistics = load_shared<Float2>(Tile::STATISTICS + in_tile * 8);
      linear_store<T>(p, row, first.finish(p, x.x, statistics), second.finish(p, x.y, statistics), first, second);
    }
    warp_barrier();
  }
}

}  // namespace gohsp::cuda
