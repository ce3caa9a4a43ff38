// SPDX-License-Identifier: Apache-2.0
// Body of every .cpp beside it: the kernels compiled for one instruction set, and the table of them.
// Tile sizes are chosen so that the accumulators, one panel row and one broadcast fit the vector registers.
#include "../checksum.h"
#include "../primitives.h"

namespace gohsp::GOHSP_ISA {

struct ProductBuffers {
  Format format;
  int64_t rows, k;
  float* row = nullptr;
  RoundedRows rounded = {};

  void lay_out(Arena& arena) {
    row = arena.take<float>(row_stride(k));
    const int64_t ld = rounded_stride(format, k), padded = round_up(rows, kBlockRows);
    rounded = {arena.take<uint8_t>(padded * ld), arena.take<float>(padded), arena.take<int32_t>(padded), ld};
  }
};

void rounded_product(const Matrix& weight, const float* x, int64_t rows, float* y) {
  ProductBuffers buffers{weight.format, rows, weight.k};
  place(buffers);
  const AmxTiles tiles(true);
  for (int64_t i = 0; i < rows; ++i) {
    copy_row(x + i * weight.k, weight.k, buffers.row);
    round_row(weight.format, buffers.row, weight.k, buffers.rounded, i);
  }
  multiply(Lhs(buffers.rounded), rows, weight, [&](int64_t r, int64_t count, int64_t n, int64_t columns, float* c) {
    for (int64_t i = 0; i < count; ++i) copy_row(c + i * N, columns, y + (r + i) * weight.n + n);
  });
}

void apply(Activation activation, const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += W) {
    alignas(64) float part[W];
    store(part, load_first(x + i, min(W, count - i)));
    activate(activation, part, W, 1, W);
    store_first(y + i, load(part), min(W, count - i));
  }
}

void exponential(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += W)
    store_first(y + i, exp(load_first(x + i, min(W, count - i))), min(W, count - i));
}

// A product whose speed is measured: zeros, small enough for the nearest caches.
struct Trial {
  static constexpr int64_t kRows = 96, kInputs = 64;
  Format format;
  float* values = nullptr;
  RoundedRows rounded = {};
  char* panel = nullptr;

  void lay_out(Arena& arena) {
    const int64_t ld = rounded_stride(format, kInputs), bytes = packed_bytes(format, N, kInputs);
    values = arena.take<float>(kRows * row_stride(kInputs));
    rounded = {arena.take<uint8_t>(kRows * ld), arena.take<float>(kRows), arena.take<int32_t>(kRows), ld};
    panel = arena.take<char>(bytes);
    if (arena.base != nullptr) __builtin_memset(values, 0, static_cast<size_t>(panel + bytes - (char*)values));
  }

  // Nanoseconds of the quickest of some runs.
  int64_t time() const {
    const Lhs left = format == Format::float32 ? Lhs(values, row_stride(kInputs)) : Lhs(rounded);
    const AmxTiles tiles(true);
    int64_t quickest = INT64_MAX;
    for (int run = 0; run < 20; ++run) {
      const int64_t begun = nanoseconds();
      multiply(left, kRows, {panel, N, kInputs, format}, [](int64_t, int64_t, int64_t, int64_t, const float*) {});
      quickest = min(quickest, nanoseconds() - begun);
    }
    return quickest;
  }
};

double bfloat16_gain() {
  Trial plain{Format::float32}, pairs{Format::bfloat16};
  place(plain);
  const int64_t by_plain = plain.time();
  place(pairs);
  return static_cast<double>(by_plain) / static_cast<double>(max(1, pairs.time()));
}

extern const KernelTable table;
const KernelTable table = {GOHSP_ISA_NAME,
                           packed_bytes,
                           pack,
                           plan_bytes,
                           plan_columns,
                           plan_fits,
                           kLevels,
                           attends_in_pairs,
                           bfloat16_gain,
                           kHasPairProducts && !kHasTiles,
                           sublayers,
                           embed,
                           linear,
                           attention,
                           rounded_product,
                           apply,
                           exponential,
                           checksum};

}  // namespace gohsp::GOHSP_ISA
