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
#include "warpgroup.cuh"

namespace gohsp::cuda {

// BM x BN results of a block, by products of single warps. They share them out by rows and columns; where WARPS_K > 1,
// all of them compute the same results over different parts of the depth, and the way out adds these up.
template <class Op_, int BM_, int BN_, int WARPS_M_, int WARPS_N_, int WARPS_K_, int CHUNKS_, int BLOCKS_>
struct LinearTile {
  using Op = Op_;
  static constexpr bool WARPGROUPS = false;
  static constexpr int BM = BM_, BN = BN_;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, WARPS_K = WARPS_K_;
  static constexpr int BLOCKS = BLOCKS_;  // of a multiprocessor, that registers must leave room for
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N * WARPS_K;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // results of a warp
  static constexpr int STAGES = 4;
  static constexpr int CHUNKS = CHUNKS_;  // of 16 bytes: depth of a step
  // A warp's results leave in pieces of 16 rows.
  static constexpr int PIECES = WM / 16, COLUMNS = WN;
  static_assert(CHUNKS / 2 % WARPS_K == 0);

  GOHSP_DEVICE static int part(int warp) { return warp % WARPS_K; }
  GOHSP_DEVICE static int row(int warp, int piece) { return warp / WARPS_K / WARPS_N * WM + piece * 16; }
  GOHSP_DEVICE static int column(int warp, int) { return warp / WARPS_K % WARPS_N * WN; }
};

// The same by products of four warps, for Hopper: 64 rows and all columns to a warpgroup.
template <class Op_, int BM_, int BN_, int STAGES_, int BLOCKS_>
struct WarpgroupTile {
  using Op = Op_;
  static constexpr bool WARPGROUPS = true;
  static constexpr int BM = BM_, BN = BN_, WARPS_K = 1, BLOCKS = BLOCKS_;
  static constexpr int THREADS = 2 * BM;
  static constexpr int STAGES = STAGES_;
  static constexpr int CHUNKS = 8;
  static constexpr int PIECES = BN / 64, COLUMNS = 64;
  static_assert(BM % 64 == 0 && BN % 64 == 0 && sizeof(typename Op::Element) == 2);

  GOHSP_DEVICE static int part(int) { return 0; }
  GOHSP_DEVICE static int row(int warp, int) { return warp * 16; }
  GOHSP_DEVICE static int column(int, int piece) { return piece * 64; }
};

// Where things lie in shared memory.
template <class Tile>
struct LinearPlaces {
  static constexpr int STAGE_BYTES = (Tile::BM + Tile::BN) * Tile::CHUNKS * kChunkBytes;
  static constexpr int STATISTICS = Tile::STAGES * STAGE_BYTES;  // those of the block's rows
  static constexpr int SHARED_BYTES = STATISTICS + Tile::BM * static_cast<int>(sizeof(Float2));
  // Results pass through shared memory: 16 rows of each warp at a time, or all of the block where they are added up.
  static constexpr bool TOGETHER = Tile::WARPS_K > 1;
  static constexpr int OUT_THREADS = TOGETHER ? Tile::THREADS : 32;  // that finish one such piece
  static constexpr int OUT_ROWS = TOGETHER ? Tile::BM : 16, OUT_COLUMNS = TOGETHER ? Tile::BN : Tile::COLUMNS;
  // The 8 columns between rows make the 8 rows of a store fall into different banks.
  static constexpr int OUT_STRIDE = OUT_COLUMNS + 8;
  static constexpr int OUT_BYTES = OUT_ROWS * OUT_STRIDE * static_cast<int>(sizeof(float));
  static_assert(Tile::CHUNKS == 4 || Tile::CHUNKS % 8 == 0);
  static_assert(Tile::THREADS / OUT_THREADS * Tile::WARPS_K * OUT_BYTES <= STATISTICS);
  static_assert(Tile::BM * Tile::CHUNKS % Tile::THREADS == 0 && Tile::BN * Tile::CHUNKS % Tile::THREADS == 0);
  static_assert(OUT_THREADS % (OUT_COLUMNS / 2) == 0);
};

// Where chunk `chunk` of row `row` lies in a stage. The order within a row turns with the row, so that 8 rows at one
// chunk, which ldmatrix reads together, lie in different banks; of rows of 64 bytes, two fill all banks. Rows of 128
// bytes lie as warpgroup.cuh wants them.
template <class Tile>
GOHSP_DEVICE uint32_t linear_chunk(int row, int chunk) {
  const int turn = Tile::CHUNKS == 4 ? row >> 1 & 3 : row & 7;
  return row * (Tile::CHUNKS * kChunkBytes) + ((chunk ^ turn) << 4);
}

// erf to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26): a third of erff's instructions, and
// far below what a result of 16 bits can show.
GOHSP_DEVICE float erf_near(float x) {
  const float size = x < 0.0f ? -x : x, t = reciprocal_fast(1.0f + 0.3275911f * size);
  const float series =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float y = 1.0f - series * exp2_fast(-1.44269504f * size * size);
  return x < 0.0f ? -y : y;
}

template <class T>
GOHSP_DEVICE float gelu(float x) {
  return 0.5f * x * (1.0f + (sizeof(T) == 2 ? erf_near(x * 0.70710678f) : erf_exact(x * 0.70710678f)));
}

// The others are relu, or x times a logistic function of a x + b x^3; numbers rather than cases, which would be compiled
// once for every result.
struct OtherActivation {
  float a = 1.0f, b = 0.0f;
  bool relu;

  GOHSP_DEVICE explicit OtherActivation(Activation activation) : relu(activation == Activation::relu) {
    if (activation == Activation::gelu_tanh) a = 1.59576912f, b = 0.0713548162f;
    if (activation == Activation::quick_gelu) a = 1.702f;
  }

  GOHSP_DEVICE float operator()(float x) const {
    if (relu) return x < 0.0f ? 0.0f : x;
    return x / (1.0f + exp_fast(-x * (a + b * smaller(x * x, 1e30f))));  // infinity times 0 is no number
  }
};

// Which activation a kernel was compiled for.
enum class Finish { identity, gelu, other };

// The copies of a block: which chunks of x and of the weight this thread brings. Places in memory are counted in chunks
// from the beginning, in 32 bits: half the registers of pointers. launch_linear refuses what is larger.
template <class Tile>
struct LinearLoader {
  static constexpr int ROWS = Tile::THREADS / Tile::CHUNKS;  // that one round of all threads brings
  static constexpr int A = Tile::BM / ROWS, B = Tile::BN / ROWS;
  const LinearParams& p;
  uint32_t a[A], b[B];
  bool a_ok[A], b_ok[B];
  int row, chunk;

  GOHSP_DEVICE LinearLoader(const LinearParams& params, int64_t first_row, int first_n) : p(params) {
    row = thread_index() / Tile::CHUNKS;
    chunk = thread_index() % Tile::CHUNKS;
    const uint32_t stride = static_cast<uint32_t>(p.x_stride) / (kChunkBytes / sizeof(typename Tile::Op::Element));
    GOHSP_UNROLL
    for (int i = 0; i < A; ++i) {
      const int64_t r = first_row + row + i * ROWS;
      a_ok[i] = r < p.rows;
      a[i] = a_ok[i] ? static_cast<uint32_t>(r) * stride : 0;
    }
    GOHSP_UNROLL
    for (int i = 0; i < B; ++i) {
      const int n = first_n + row + i * ROWS;
      b_ok[i] = n < p.n;
      b[i] = b_ok[i] ? n * p.chunks : 0;
    }
  }

  GOHSP_DEVICE static const void* chunk_of(const void* base, uint32_t place) {
    return static_cast<const char*>(base) + uint64_t{place} * kChunkBytes;
  }

  GOHSP_DEVICE void bring_rows(int step, int stage) const {
    const int place = step * Tile::CHUNKS + chunk;  // in the depth
    const bool inside = place < p.chunks;
    int source = inside ? place : 0;
    if (inside && p.in_chunks != nullptr) source = load_global(p.in_chunks + place);
    const uint32_t base = stage * LinearPlaces<Tile>::STAGE_BYTES;
    GOHSP_UNROLL
    for (int i = 0; i < A; ++i)
      copy_async(base + linear_chunk<Tile>(row + i * ROWS, chunk), chunk_of(p.x, a[i] + source), inside && a_ok[i]);
  }

  GOHSP_DEVICE void bring_weight(int step, int stage) const {
    const int place = step * Tile::CHUNKS + chunk;
    const bool inside = place < p.chunks;
    const uint32_t base = stage * LinearPlaces<Tile>::STAGE_BYTES;
    GOHSP_UNROLL
    for (int i = 0; i < B; ++i)
      copy_async(base + linear_chunk<Tile>(Tile::BM + row + i * ROWS, chunk),
                 chunk_of(p.weight, b[i] + (inside ? place : 0)), inside && b_ok[i]);
  }
};

template <class Tile>
using LinearSums = float[Tile::PIECES][Tile::COLUMNS / 8][4];

// One step of the depth on one stage: this warp's results, over its part of the depth.
template <class Tile>
GOHSP_DEVICE void linear_step(LinearSums<Tile>& acc, int stage, int warp) {
  const int lane = thread_index() % 32;
  const uint32_t base = stage * LinearPlaces<Tile>::STAGE_BYTES;
  GOHSP_UNROLL
  for (int part = 0; part < Tile::CHUNKS / 2 / Tile::WARPS_K; ++part) {
    const int half = part * Tile::WARPS_K + Tile::part(warp);
    uint32_t a[Tile::PIECES][4];
    GOHSP_UNROLL
    for (int i = 0; i < Tile::PIECES; ++i)
      load_matrices(a[i], base + linear_chunk<Tile>(Tile::row(warp, i) + lane % 16, 2 * half + lane / 16));
    GOHSP_UNROLL
    for (int j = 0; j < Tile::COLUMNS / 16; ++j) {
      uint32_t b[4];  // two fragments of 8 columns
      const int n = Tile::BM + Tile::column(warp, 0) + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b, base + linear_chunk<Tile>(n, 2 * half + lane / 8 % 2));
      GOHSP_UNROLL
      for (int i = 0; i < Tile::PIECES; ++i) {
        Tile::Op::multiply(acc[i][2 * j], a[i], b[0], b[1]);
        Tile::Op::multiply(acc[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// The same by four warps together; it only begins here.
template <class Tile>
GOHSP_DEVICE void begin_warpgroup_step(LinearSums<Tile>& acc, int stage, int warp) {
  const uint32_t base = stage * LinearPlaces<Tile>::STAGE_BYTES, rows = base + warp / 4 * 64 * 128;
  begin_products();
  GOHSP_UNROLL
  for (int half = 0; half < Tile::CHUNKS / 2; ++half)
    WarpgroupProduct<typename Tile::Op::Element, Tile::BN>::multiply(&acc[0][0][0], rows + 32 * half,
                                                                     base + Tile::BM * 128 + 32 * half);
  commit_products();
}

// 16 rows of a warp's results into a piece of the way out.
template <class Tile>
GOHSP_DEVICE void store_fragments(const float acc[Tile::COLUMNS / 8][4], uint32_t piece, int row, int column) {
  const int lane = thread_index() % 32;
  GOHSP_UNROLL
  for (int j = 0; j < Tile::COLUMNS / 8; ++j) {
    const uint32_t place =
        piece + ((row + lane / 4) * LinearPlaces<Tile>::OUT_STRIDE + column + j * 8 + lane % 4 * 2) * 4;
    store_shared(place, Float2{acc[j][0], acc[j][1]});
    store_shared(place + 8 * LinearPlaces<Tile>::OUT_STRIDE * 4, Float2{acc[j][2], acc[j][3]});
  }
}

// Mean and 1 / standard deviation of the tile's rows, into shared memory: from what the launch that wrote them has left
// of each kPartial columns, or from the rows themselves.
template <class Tile>
GOHSP_DEVICE void linear_statistics(const LinearParams& p, int64_t first_row) {
  using T = typename Tile::Op::Element;
  const int lanes = p.partials != nullptr ? 2 : 8;  // of a row
  for (int r = thread_index() / lanes; r < Tile::BM; r += Tile::THREADS / lanes) {
    const int64_t row = first_row + r;
    const bool there = row < p.rows;
    const int64_t from = there ? row : 0;
    const Float2 statistics =
        p.partials != nullptr
            ? merged_partials(p.partials + from * (p.features / kPartial), there, p.features, p.eps)
            : statistics_of_four(static_cast<const T*>(p.x) + from * p.x_stride, there, p.features, p.eps);
    if (thread_index() % lanes == 0) store_shared(LinearPlaces<Tile>::STATISTICS + r * 8, statistics);
  }
}

// --- the way out -----------------------------------------------------------------------------------------------------
// A piece of the results, OUT_ROWS x OUT_COLUMNS, in shared memory: WARPS_K parts that are added up, each `stride` bytes
// behind the other. `first_in_tile`: its first row in the tile; `me`: which of the OUT_THREADS this thread is.
struct Piece {
  uint32_t base, stride;
  int64_t first_row;
  int first_in_tile, first_n, last_n, me;
};

// Mean, and sum of the squares about it, of kPartial columns of a row, N of which each of neighbouring lanes has. All
// lanes take part.
template <int N>
GOHSP_DEVICE void leave_partial(const LinearParams& p, const float* numbers, int64_t row, int n, bool there) {
  float mean = 0.0f, squares = 0.0f;
  GOHSP_UNROLL
  for (int i = 0; i < N; ++i) mean += numbers[i];
  mean *= 1.0f / N;
  GOHSP_UNROLL
  for (int i = 0; i < N; ++i) squares += (numbers[i] - mean) * (numbers[i] - mean);
  GOHSP_UNROLL
  for (int mask = 1; mask < kPartial / N; mask *= 2) merge_lanes(N * mask, mean, squares, mask);
  if (there && n % kPartial == 0)
    store_global(p.partials_out + row * (p.n / kPartial) + n / kPartial, Float2{mean, squares});
}

// Where row `row` of out begins in the residual.
GOHSP_DEVICE int64_t residual_row(const LinearParams& p, int64_t row) {
  return (p.queries == p.tokens ? row : row / p.queries * p.tokens + row % p.queries) * p.out_stride;
}

// Columns in order and rows that begin at multiples of 16 bytes: neighbours in a row to a thread, residuals brought before
// they are wanted, the choice of the activation outside the loops. Where LayerNorm comes next, mean and sum of squares
// about it of each kPartial columns are left for it.
template <class Tile, bool normalised, class Function>
GOHSP_DEVICE void finish_wide(const LinearParams& p, const Piece& piece, Function activation) {
  using T = typename Tile::Op::Element;
  using Places = LinearPlaces<Tile>;
  constexpr int ALL = Places::OUT_ROWS * Places::OUT_COLUMNS / Places::OUT_THREADS;
  constexpr int N = smaller(kChunkBytes / static_cast<int>(sizeof(T)), ALL);  // columns of a thread
  constexpr int LANES = Places::OUT_COLUMNS / N, ROWS = Places::OUT_THREADS / LANES, ROUNDS = Places::OUT_ROWS / ROWS;
  static_assert(ROUNDS * ROWS == Places::OUT_ROWS && kPartial % N == 0);
  struct alignas(N * sizeof(T)) Some {
    T of[N];
  } residual[ROUNDS];
  const int column = piece.me % LANES * N, n = piece.first_n + column, in_piece = piece.me / LANES;
  const bool inside = n < p.n;  // p.n is a multiple of N
  GOHSP_UNROLL
  for (int k = 0; k < ROUNDS; ++k) {
    const int64_t row = piece.first_row + in_piece + k * ROWS;
    if (p.residual == nullptr || !inside || row >= p.rows) continue;
    residual[k] =
        load_global(reinterpret_cast<const Some*>(static_cast<const T*>(p.residual) + residual_row(p, row) + n));
  }
  Numbers<N> bias{}, row_sum{};
  if (p.bias != nullptr && inside) bias = load_global(reinterpret_cast<const Numbers<N>*>(p.bias + n));
  if (normalised && inside) row_sum = load_global(reinterpret_cast<const Numbers<N>*>(p.row_sum + n));
  GOHSP_UNROLL
  for (int k = 0; k < ROUNDS; ++k) {
    const int r = in_piece + k * ROWS;
    const int64_t row = piece.first_row + r;
    const bool there = inside && row < p.rows;
    Numbers<N> x{};
    if (there) {
      x = load_shared<Numbers<N>>(piece.base + (r * Places::OUT_STRIDE + column) * 4);
      GOHSP_UNROLL
      for (int part = 1; part < Tile::WARPS_K; ++part) {
        const Numbers<N> more =
            load_shared<Numbers<N>>(piece.base + part * piece.stride + (r * Places::OUT_STRIDE + column) * 4);
        GOHSP_UNROLL
        for (int i = 0; i < N; ++i) x.of[i] += more.of[i];
      }
      Float2 statistics{0.0f, 1.0f};
      if (normalised) statistics = load_shared<Float2>(Places::STATISTICS + (piece.first_in_tile + r) * 8);
      const float shift = -statistics.x * statistics.y;
      GOHSP_UNROLL
      for (int i = 0; i < N; ++i) {
        float y = normalised ? x.of[i] * statistics.y + (row_sum.of[i] * shift + bias.of[i]) : x.of[i] + bias.of[i];
        y = activation(y);
        if (p.scale != nullptr) y *= load_global(p.scale + n + i);
        if (p.residual != nullptr) y += to_float(residual[k].of[i]);
        x.of[i] = y;
      }
      store_numbers(static_cast<T*>(p.out) + row * p.out_stride + n, x);
    }
    if (p.partials_out != nullptr) leave_partial<N>(p, x.of, row, n, there);
  }
}

// What the results of one column go through, where columns are scattered or rows begin anywhere.
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

  template <class Function>
  GOHSP_DEVICE float finish(float x, Float2 statistics, Function activation) const {
    if (!computed) return 0.0f;
    return scale * activation((x - statistics.x * row_sum) * statistics.y + bias);
  }
};

// Adds the residual of one row to two results and stores them.
template <class T>
GOHSP_DEVICE void linear_store(const LinearParams& p, int64_t row, float x, float y, const LinearColumn& first,
                               const LinearColumn& second) {
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const T* residual = static_cast<const T*>(p.residual) + (p.residual == nullptr ? 0 : residual_row(p, row));
  if (p.paired && second.ok) {
    if (p.residual != nullptr) {
      const Pair<T> add = load_global(reinterpret_cast<const Pair<T>*>(residual + first.column));
      x += to_float(add.x);
      y += to_float(add.y);
    }
    store_global(reinterpret_cast<Pair<T>*>(out + first.column), Pair<T>{from_float<T>(x), from_float<T>(y)});
    return;
  }
  if (p.residual != nullptr) {
    if (first.ok) x += to_float(load_global(residual + first.column));
    if (second.ok) y += to_float(load_global(residual + second.column));
  }
  if (first.ok) store_global(out + first.column, from_float<T>(x));
  if (second.ok) store_global(out + second.column, from_float<T>(y));
}

// The same for any columns and rows, two columns a thread.
template <class Tile, class Function>
GOHSP_DEVICE void finish_pairs(const LinearParams& p, const Piece& piece, Function activation) {
  using T = typename Tile::Op::Element;
  constexpr int PAIRS = LinearPlaces<Tile>::OUT_COLUMNS / 2, ROWS = LinearPlaces<Tile>::OUT_THREADS / PAIRS;
  const int column = piece.me % PAIRS * 2, n = piece.first_n + column;
  const LinearColumn first(p, n, piece.last_n), second(p, n + 1, piece.last_n);
  const bool normalised = p.row_sum != nullptr && piece.first_n < p.n;
  for (int r = piece.me / PAIRS; r < LinearPlaces<Tile>::OUT_ROWS; r += ROWS) {
    const int64_t row = piece.first_row + r;
    if (row >= p.rows) break;
    Float2 x{0.0f, 0.0f};
    GOHSP_UNROLL
    for (int part = 0; part < Tile::WARPS_K; ++part) {
      const Float2 more =
          load_shared<Float2>(piece.base + part * piece.stride + (r * LinearPlaces<Tile>::OUT_STRIDE + column) * 4);
      x.x += more.x;
      x.y += more.y;
    }
    Float2 statistics{0.0f, 1.0f};
    if (normalised) statistics = load_shared<Float2>(LinearPlaces<Tile>::STATISTICS + (piece.first_in_tile + r) * 8);
    linear_store<T>(p, row, first.finish(x.x, statistics, activation), second.finish(x.y, statistics, activation),
                    first, second);
  }
}

template <class Tile, class Function>
GOHSP_DEVICE void finish_piece(const LinearParams& p, const Piece& piece, Function activation) {
  if (!p.wide || piece.first_n >= p.n) return finish_pairs<Tile>(p, piece, activation);
  return p.row_sum != nullptr ? finish_wide<Tile, true>(p, piece, activation)
                              : finish_wide<Tile, false>(p, piece, activation);
}

// --- the kernel ------------------------------------------------------------------------------------------------------
template <class Tile, Finish finish>
GOHSP_KERNEL(Tile::THREADS, Tile::BLOCKS)
linear_kernel(const LinearParams p) {
  using T = typename Tile::Op::Element;
  using Places = LinearPlaces<Tile>;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  // Tiles of one range of rows are neighbours, so they run together and share those rows in the L2 cache. Behind the
  // tiles with a product come those of the columns that nothing is added to, unless these are in place already.
  const int tiles_computed = divide_up(p.n, Tile::BN);
  const uint32_t tiles = tiles_computed + (p.out == p.residual ? 0 : divide_up(p.out_features - p.n, Tile::BN));
  const int tile_n = static_cast<int>(block_index() % tiles);
  const int64_t first_row = int64_t{block_index() / tiles} * Tile::BM;
  const bool computed = tile_n < tiles_computed;
  const int first_n = computed ? tile_n * Tile::BN : p.n + (tile_n - tiles_computed) * Tile::BN;
  const int last_n = computed ? p.n : p.out_features;
  const int steps = computed ? divide_up(p.chunks, Tile::CHUNKS) : 0;

  // Weights are there already while the launch before may still be computing the rows.
  const LinearLoader<Tile> loader(p, first_row, first_n);
  let_next_launch_begin();
  GOHSP_UNROLL
  for (int step = 0; step < Tile::STAGES - 1; ++step)
    if (step < steps) loader.bring_weight(step, step);
  wait_for_launch_before();
  GOHSP_UNROLL
  for (int step = 0; step < Tile::STAGES - 1; ++step) {
    if (step < steps) loader.bring_rows(step, step);
    commit();
  }
  const bool normalised = sizeof(T) == 2 && computed && p.row_sum != nullptr;

  if (!Tile::WARPGROUPS && normalised) linear_statistics<Tile>(p, first_row);

  LinearSums<Tile> acc = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Tile::STAGES, next = step + Tile::STAGES - 1;
    wait_copies<Tile::STAGES - 2>();
    if constexpr (Tile::WARPGROUPS) fence_for_products();
    barrier();  // this step has arrived for all, and all are done with the one before, whose stage is filled next
    if constexpr (Tile::WARPGROUPS) begin_warpgroup_step<Tile>(acc, stage, warp);
    if (next < steps) {
      loader.bring_weight(next, next % Tile::STAGES);
      loader.bring_rows(next, next % Tile::STAGES);
    }
    commit();
    // A product of four warps is under way, and registers suffice; see above for the others.
    if (Tile::WARPGROUPS && step == 0 && normalised) linear_statistics<Tile>(p, first_row);
    if constexpr (Tile::WARPGROUPS)
      wait_products<Tile::BN>(&acc[0][0][0]);
    else
      linear_step<Tile>(acc, stage, warp);
  }
  wait_copies<0>();
  barrier();

  const auto leave = [&](const Piece& piece) {
    if constexpr (finish == Finish::identity)
      finish_piece<Tile>(p, piece, [](float x) { return x; });
    else if constexpr (finish == Finish::gelu)
      finish_piece<Tile>(p, piece, [](float x) { return gelu<T>(x); });
    else
      finish_piece<Tile>(p, piece, OtherActivation(p.activation));
  };
  if constexpr (Places::TOGETHER) {
    GOHSP_UNROLL
    for (int i = 0; i < Tile::PIECES; ++i)
      store_fragments<Tile>(acc[i], Tile::part(warp) * Places::OUT_BYTES, Tile::row(warp, i), Tile::column(warp, i));
    barrier();
    leave({0, Places::OUT_BYTES, first_row, 0, first_n, last_n, thread_index()});
  } else {
    const uint32_t out = warp * Places::OUT_BYTES;
    GOHSP_UNROLL
    for (int i = 0; i < Tile::PIECES; ++i) {
      const int row = Tile::row(warp, i);
      store_fragments<Tile>(acc[i], out, 0, 0);
      warp_barrier();
      leave({out, 0, first_row + row, row, first_n + Tile::column(warp, i), last_n, lane});
      warp_barrier();
    }
  }
}

}  // namespace gohsp::cuda
