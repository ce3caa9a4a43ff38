// SPDX-License-Identifier: Apache-2.0
// The primitives of warpgroup.cuh on the host. Operands are read from shared memory where the swizzle of 128 bytes puts
// them: bits 7 to 9 of an address turn bits 4 to 6. Between a product and the wait for it, a write over what it reads is
// a Fault, and so is a product that reads what its writer has not fenced.
#pragma once

#include "device.h"

namespace gohsp::cuda {

inline void fence_for_products() { Block::current()->fence_for_products(); }
inline void begin_products() {}
inline void commit_products() {}

namespace emulate {

struct Sums {
  float* d;
  uint32_t a, b;
};

// Number k of row `row` of an operand that begins at `address`.
template <class T>
double operand_number(uint32_t address, int row, int k, int thread, Place place) {
  const uint32_t plain = address + row / 8 * 1024 + row % 8 * 128 + k * 2;
  T number;
  Block::current()->read_for_product(plain ^ (plain >> 7 & 7) << 4, &number, sizeof number, thread, place);
  return to_float(number);
}

}  // namespace emulate

template <class T, int N>
struct WarpgroupProduct {
  static void multiply(float* d, uint32_t a, uint32_t b, Place place = Place::here()) {
    emulate::Sums mine{d, a, b};
    Block::current()->collective(
        mine,
        [place](emulate::Sums** lanes, int first) {
          constexpr int K = 16;
          static thread_local double left[16][K], right[N][K];
          const int top = first / emulate::kWarp % 4 * 16;  // this warp's rows of the 64
          for (int k = 0; k < K; ++k) {
            for (int r = 0; r < 16; ++r) left[r][k] = emulate::operand_number<T>(lanes[0]->a, top + r, k, first, place);
            for (int n = 0; n < N; ++n) right[n][k] = emulate::operand_number<T>(lanes[0]->b, n, k, first, place);
          }
          for (int l = 0; l < emulate::kWarp; ++l)
            for (int i = 0; i < N / 2; ++i) {
              const int row = l / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
              double sum = lanes[l]->d[i];
              for (int k = 0; k < K; ++k) sum += left[row][k] * right[column][k];
              lanes[l]->d[i] = static_cast<float>(sum);
            }
        },
        place);
  }
};

template <int N>
void wait_products(float*) {
  Block::current()->wait_products();
}

}  // namespace gohsp::cuda
