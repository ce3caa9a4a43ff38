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

constexpr int kRowsThreads = 256;

// One warp a row.
template <class T>
GOHSP_KERNEL(kRowsThreads, 4)
rows_kernel(const RowsParams p) {
  const int lane = thread_index() % 32;
  const int64_t row = block_index() * (kRowsThreads / 32) + thread_index() / 32;
  if (row >= p.rows) return;
  const T* x = static_cast<const T*>(p.x) + row * p.features;
  Float2 statistics{0.0f, 1.0f};
  if (p.statistics != nullptr || p.normalise) statistics = row_statistics(x, p.features, p.aligned, p.eps);
  if (p.statistics != nullptr) {
    if (lane == 0) store_global(p.statistics + row, statistics);
    return;
  }
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
