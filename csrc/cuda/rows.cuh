// SPDX-License-Identifier: Apache-2.0
// LayerNorm's statistics of rows, and copies of rows that a matrix product can read 16 bytes at a time.
#pragma once

#include "operands.cuh"

namespace gohsp::cuda {

// Sum of f(x) over a row, by one warp: 16 bytes a lane where the row allows.
template <class T, class Function>
GOHSP_DEVICE float sum_over_row(const T* row, int features, bool aligned, Function f) {
  constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(T));
  const int lane = thread_index() % 32;
  const int whole = aligned ? features / kPerChunk : 0;
  float sum = 0.0f;
  for (int chunk = lane; chunk < whole; chunk += 32) {
    union {
      Bytes16 bytes;
      T numbers[kPerChunk];
    } u;
    u.bytes = load_global(reinterpret_cast<const Bytes16*>(row) + chunk);
    GOHSP_UNROLL
    for (int i = 0; i < kPerChunk; ++i) sum += f(to_float(u.numbers[i]));
  }
  for (int c = whole * kPerChunk + lane; c < features; c += 32) sum += f(to_float(load_global(row + c)));
  return sum_of_warp(sum);
}

// Mean and 1 / standard deviation of a row, in two passes, the second from cache: no cancellation.
template <class T>
GOHSP_DEVICE Float2 row_statistics(const T* row, int features, bool aligned, float eps) {
  const float mean = sum_over_row(row, features, aligned, [](float x) { return x; }) / features;
  const float squares = sum_over_row(row, features, aligned, [mean](float x) { return (x - mean) * (x - mean); });
  return {mean, rsqrt_fast(squares / features + eps)};
}

// The same of four rows at once, eight lanes a row, in one pass over memory: sums about a pivot, the mean of the row's
// first 16 bytes. The mean of 8 of D numbers is never further than sqrt(D / 8 - 1) standard deviations from that of all,
// which bounds the cancellation. For 16 bits; rows begin at multiples of 16 bytes. Every lane of the warp takes part.
template <class T>
GOHSP_DEVICE Float2 statistics_of_four(const T* row, bool there, int features, float eps) {
  constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(T));
  const int lane = thread_index() % 8;
  const int chunks = there ? features / kPerChunk : 0;
  union Chunk {
    Bytes16 bytes;
    T numbers[kPerChunk];
  };
  float pivot = 0.0f;
  if (chunks > 0) {
    Chunk first;
    first.bytes = load_global(reinterpret_cast<const Bytes16*>(row));
    GOHSP_UNROLL
    for (int i = 0; i < kPerChunk; ++i) pivot += to_float(first.numbers[i]);
    pivot *= 1.0f / kPerChunk;
  }
  float sum = 0.0f, squares = 0.0f;
  GOHSP_UNROLL_BY(2)
  for (int c = lane; c < chunks; c += 8) {
    Chunk u;
    u.bytes = load_global(reinterpret_cast<const Bytes16*>(row) + c);
    GOHSP_UNROLL
    for (int i = 0; i < kPerChunk; ++i) {
      const float x = to_float(u.numbers[i]) - pivot;
      sum += x;
      squares += x * x;
    }
  }
  GOHSP_UNROLL
  for (int mask = 4; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
    squares += shuffle_xor(squares, mask);
  }
  const float share = 1.0f / features, from_pivot = sum * share;
  return {pivot + from_pivot, rsqrt_fast(max_of(squares * share - from_pivot * from_pivot, 0.0f) + eps)};
}

// Takes the numbers of the lane `mask` away into account, as many as this one has: their mean and their sum of squares
// about it (Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979).
GOHSP_DEVICE void merge_lanes(float count, float& mean, float& squares, int mask) {
  const float apart = shuffle_xor(mean, mask) - mean;
  squares += shuffle_xor(squares, mask) + apart * apart * (0.5f * count);
  mean += 0.5f * apart;
}

// Mean and 1 / standard deviation of a row, by two neighbouring lanes, from those of each kPartial columns, of which
// there is an even number; those of 384 columns are all on their way at once.
GOHSP_DEVICE Float2 merged_partials(const Float2* row, bool there, int features, float eps) {
  constexpr int kAtOnce = 6;
  const int parts = there ? features / (2 * kPartial) : 0;  // of a lane
  const Float2* mine = row + thread_index() % 2 * parts;
  float pivot = 0.0f, sum = 0.0f, spread = 0.0f, squares = 0.0f;  // of the means about the pivot; of the numbers
  GOHSP_UNROLL_BY(1)
  for (int first = 0; first < parts; first += kAtOnce) {
    Float2 part[kAtOnce];
    GOHSP_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < parts) part[i] = load_global(mine + first + i);
    if (first == 0) pivot = part[0].x;
    GOHSP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= parts) continue;
      sum += part[i].x - pivot;
      spread += (part[i].x - pivot) * (part[i].x - pivot);
      squares += part[i].y;
    }
  }
  const float from_pivot = parts > 0 ? sum / static_cast<float>(parts) : 0.0f;
  float mean = pivot + from_pivot;
  squares += kPartial * (spread - sum * from_pivot);
  merge_lanes(static_cast<float>(parts * kPartial), mean, squares, 1);
  return {mean, rsqrt_fast(max_of(squares, 0.0f) / features + eps)};
}

constexpr int kRowsThreads = 256;

// One warp a row.
template <class T>
GOHSP_KERNEL(kRowsThreads, 4)
rows_kernel(const RowsParams p) {
  const int lane = thread_index() % 32;
  const int64_t row = int64_t{block_index()} * (kRowsThreads / 32) + thread_index() / 32;
  let_next_launch_begin();
  wait_for_launch_before();
  if (row >= p.rows) return;
  const T* x = static_cast<const T*>(p.x) + row * p.features;
  Float2 statistics{0.0f, 1.0f};
  if (p.normalise) statistics = row_statistics(x, p.features, p.aligned, p.eps);
  T* copy = static_cast<T*>(p.copy) + row * p.copy_stride;
  for (int c = lane; c < p.copy_stride; c += 32) {
    T value{};
    if (c < p.count) {
      const int column = p.columns == nullptr ? c : load_global(p.columns + c);
      value = load_global(x + column);
      if (p.normalise) value = from_float<T>((to_float(value) - statistics.x) * statistics.y);
    }
    store_global(copy + c, value);
  }
}

}  // namespace gohsp::cuda
