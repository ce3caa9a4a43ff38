// SPDX-License-Identifier: Apache-2.0
// Work on rows: LayerNorm, the gather of kept columns, the scatter of kept outputs, activations, transposition.
//
// Kept columns ascend, so a gather is a compression and a scatter an expansion of whole vectors: the lanes of one vector
// stay in order and only close up or spread. Both become one permutation a vector, by indices that are prepared once,
// when weights are packed, instead of one scalar move an element.
#pragma once

#include "product.h"

namespace gohsp::GOHSP_ISA {

// What each vector of W dense columns does: `lanes` is the permutation, `base` the first kept column at or after the
// vector's first, `kept` how many of the W are kept.
struct ColumnVector {
  int32_t lanes[W];
  int32_t mask[W];  // of an expansion: -1 in the lanes that receive something
  int64_t base;
  int64_t kept;
};

inline int64_t plan_bytes(int64_t features) {
  return ceil_div(features, W) * static_cast<int64_t>(sizeof(ColumnVector));
}

inline void plan_columns(const int64_t* kept, int64_t count, int64_t features, Direction direction, void* to) {
  ColumnVector* plan = static_cast<ColumnVector*>(to);
  int64_t next = 0;
  for (int64_t first = 0; first < features; first += W, ++plan) {
    plan->base = next;
    for (int64_t j = 0; j < W; ++j) plan->lanes[j] = plan->mask[j] = 0;
    while (next < count && kept[next] < first + W) {
      const int64_t lane = kept[next] - first, place = next - plan->base;
      if (direction == Direction::gather) {
        plan->lanes[place] = static_cast<int32_t>(lane);
      } else {
        plan->lanes[lane] = static_cast<int32_t>(place);
        plan->mask[lane] = -1;
      }
      ++next;
    }
    plan->kept = next - plan->base;
  }
}

// Lanes choose within a vector, so only the bases lead anywhere.
inline bool plan_fits(const Columns& columns, int64_t features) {
  const ColumnVector* plan = static_cast<const ColumnVector*>(columns.plan);
  int64_t next = 0;
  for (int64_t first = 0; first < features; first += W, ++plan) {
    if (plan->base != next || plan->kept < 0 || plan->kept > W) return false;
    next += plan->kept;
  }
  return next == columns.count;
}

inline const ColumnVector* plan_of(const Columns& columns) { return static_cast<const ColumnVector*>(columns.plan); }

// Closes up the kept columns of a row. x and y may overrun their ends by one vector.
inline void compress_row(const float* x, int64_t features, const ColumnVector* plan, float* y) {
  for (int64_t first = 0; first < features; first += W, ++plan)
    store(y + plan->base, permute(load(x + first), load_ints(plan->lanes)));
}

// Dense columns [first, first + W) of the row whose kept columns are y; zero where none is kept.
inline Vec expand_vector(const float* y, const ColumnVector& plan) {
  const Vec spread = permute(load(y + plan.base), load_ints(plan.lanes));
  return bits_as_float(float_as_bits(spread) & load_ints(plan.mask));
}

// y = (x - mean) / sqrt(variance + eps), in two passes over a row that stays in L1; an RMSNorm has a mean of 0. The row
// has `features`, of which those behind x[count] are zeros. y may be x, and may overrun by one vector.
inline void normalise_row(Norm norm, const float* x, int64_t count, int64_t features, float eps, float* y) {
  const int64_t whole = count / W * W, rest = count - whole;
  float mean = 0.0f;
  if (norm == Norm::layer) {
    Vec sum = load_first(x + whole, rest);
    for (int64_t j = 0; j < whole; j += W) sum += load(x + j);
    mean = sum_lanes(sum) / static_cast<float>(features);
  }
  Vec squares = {};
  for (int64_t j = 0; j < rest; ++j) squares[j] = (x[whole + j] - mean) * (x[whole + j] - mean);
  for (int64_t j = 0; j < whole; j += W) {
    const Vec d = load(x + j) - mean;
    squares += d * d;
  }
  const float zeros = static_cast<float>(features - count) * mean * mean;
  const float scale = 1.0f / __builtin_sqrtf((sum_lanes(squares) + zeros) / static_cast<float>(features) + eps);
  for (int64_t j = 0; j < whole; j += W) store(y + j, (load(x + j) - mean) * scale);
  if (rest > 0) store(y + whole, (load_first(x + whole, rest) - mean) * scale);
}

// x = x * weight + bias, in place.
inline void scale_and_shift(float* x, const float* weight, const float* bias, int64_t count) {
  const int64_t whole = count / W * W;
  for (int64_t j = 0; j < whole; j += W) store(x + j, load(x + j) * load(weight + j) + load(bias + j));
  for (int64_t j = whole; j < count; ++j) x[j] = x[j] * weight[j] + bias[j];
}

inline void copy_row(const float* x, int64_t features, float* y) {
  if (features > 0) __builtin_memcpy(y, x, static_cast<size_t>(features) * sizeof(float));
}

template <Vec (*Function)(Vec)>
inline void map(float* x, int64_t ldx, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += W) store(x + i * ldx + j, Function(load(x + i * ldx + j)));
}

inline Vec relu(Vec x) { return x < 0.0f ? splat(0.0f) : x; }
inline Vec silu(Vec x) { return x * sigmoid(x); }
inline Vec quick_gelu(Vec x) { return x * sigmoid(1.702f * x); }

// In place on whole vectors: the lanes past `columns` in the last one are computed and never used.
inline void activate(Activation activation, float* x, int64_t ldx, int64_t rows, int64_t columns) {
  switch (activation) {
    case Activation::identity: return;
    case Activation::gelu: return map<gelu>(x, ldx, rows, columns);
    case Activation::gelu_tanh: return map<gelu_tanh>(x, ldx, rows, columns);
    case Activation::relu: return map<relu>(x, ldx, rows, columns);
    case Activation::silu: return map<silu>(x, ldx, rows, columns);
    case Activation::quick_gelu: return map<quick_gelu>(x, ldx, rows, columns);
  }
}

// y[0:rows, 0:n] = activation(a W^T + b). y may overrun a row by less than a vector.
inline void store_product(const Lhs& a, int64_t rows, const Matrix& w, Activation activation, float* y, int64_t ldy) {
  multiply(a, rows, w, [=](int64_t r, int64_t count, int64_t n, int64_t columns, float* c) {
    activate(activation, c, N, count, columns);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < columns; j += W) store(y + (r + i) * ldy + n + j, load(c + i * N + j));
  });
}

// y *= a W^T + b.
inline void multiply_by_product(const Lhs& a, int64_t rows, const Matrix& w, float* y, int64_t ldy) {
  multiply(a, rows, w, [=](int64_t r, int64_t count, int64_t n, int64_t columns, float* c) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < columns; j += W) {
        float* to = y + (r + i) * ldy + n + j;
        store(to, load(to) * load(c + i * N + j));
      }
  });
}

// The product of store_product, rounded for weights of a format that rounds tiles.
inline void store_rounded(const Lhs& a, int64_t rows, const Matrix& w, Activation activation, Format format,
                          const RoundedRows& to) {
  multiply(a, rows, w, [&](int64_t r, int64_t count, int64_t n, int64_t columns, float* c) {
    activate(activation, c, N, count, columns);
    round_tile(format, c, count, columns, to, r, n);
  });
}

// y = x + c over `columns` columns exactly. y may be x.
inline void add_vectors(const float* x, const float* c, int64_t columns, float* y) {
  const int64_t whole = columns / W * W, rest = columns - whole;
  for (int64_t j = 0; j < whole; j += W) store(y + j, load(x + j) + load(c + j));
  if (rest > 0) store_first(y + whole, load_first(x + whole, rest) + load(c + whole), rest);
}

// y = x + the row whose kept columns are `packed`. y may be x.
inline void add_spread(const float* x, const float* packed, const ColumnVector* plan, int64_t features, float* y) {
  const int64_t whole = features / W * W, rest = features - whole;
  for (int64_t j = 0; j < whole; j += W, ++plan) store(y + j, load(x + j) + expand_vector(packed, *plan));
  if (rest > 0) store_first(y + whole, load_first(x + whole, rest) + expand_vector(packed, *plan), rest);
}

// Transposes a W x W square held in registers: log2(W) rounds, each exchanging halves of ever smaller blocks between
// row i and row i + Step.
template <int64_t Step = W / 2>
inline void transpose_square(Vec (&r)[W]) {
  IntVec low = {}, high = {};
  for (int64_t j = 0; j < W; ++j) {
    const bool first_half = (j / Step) % 2 == 0;
    low[j] = static_cast<int32_t>(first_half ? j : W + j - Step);
    high[j] = static_cast<int32_t>(first_half ? j + Step : W + j);
  }
#pragma GCC unroll 32
  for (int64_t i = 0; i < W; ++i) {
    if ((i / Step) % 2 != 0) continue;
    const Vec a = r[i], b = r[i + Step];
    r[i] = permute(a, b, low);
    r[i + Step] = permute(a, b, high);
  }
  if constexpr (Step > 1) transpose_square<Step / 2>(r);
}

// y[j * ldy + i] = x[i * ldx + j]. x may overrun its columns by a vector; y is written exactly.
inline void transpose(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* y, int64_t ldy) {
  for (int64_t j0 = 0; j0 < columns; j0 += W) {
    const int64_t width = min(W, columns - j0);
    int64_t i0 = 0;
    for (; i0 + W <= rows; i0 += W) {
      Vec square[W];
#pragma GCC unroll 32
      for (int64_t i = 0; i < W; ++i) square[i] = load(x + (i0 + i) * ldx + j0);
      transpose_square(square);
      for (int64_t j = 0; j < width; ++j) store(y + (j0 + j) * ldy + i0, square[j]);
    }
    for (; i0 < rows; ++i0)
      for (int64_t j = 0; j < width; ++j) y[(j0 + j) * ldy + i0] = x[i0 * ldx + j0 + j];
  }
}

}  // namespace gohsp::GOHSP_ISA
