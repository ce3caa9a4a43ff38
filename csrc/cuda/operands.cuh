// SPDX-License-Identifier: Apache-2.0
// The four precisions of a product, as types. In bytes all products are alike: a step of 32 bytes of the depth is 16
// numbers of 16 bits or 8 of 32, and ldmatrix hands both out as mma wants them. So one kernel text serves all.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace gohsp::cuda {

constexpr int kStepBytes = 32;

struct F16 {
  using Element = Half;
  GOHSP_DEVICE static void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    mma_f16(d, a, b0, b1);
  }
};

struct Bf16 {
  using Element = Bfloat16;
  GOHSP_DEVICE static void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

struct Tf32 {
  using Element = float;
  GOHSP_DEVICE static void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    const uint32_t rounded[4] = {to_tf32(float_of(a[0])), to_tf32(float_of(a[1])), to_tf32(float_of(a[2])),
                                 to_tf32(float_of(a[3]))};
    mma_tf32(d, rounded, to_tf32(float_of(b0)), to_tf32(float_of(b1)));
  }
};

// A float32 is a tf32 and a rest that is one too, nearly. Left out is the product of the rests, below 2^-22.
struct F32 {
  using Element = float;
  GOHSP_DEVICE static void split(uint32_t x, uint32_t& high, uint32_t& low) {
    high = to_tf32(float_of(x));
    low = to_tf32(float_of(x) - float_of(high));
  }
  GOHSP_DEVICE static void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    GOHSP_UNROLL
    for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
    split(b0, b_high[0], b_low[0]);
    split(b1, b_high[1], b_low[1]);
    mma_tf32(d, a_low, b_high[0], b_high[1]);
    mma_tf32(d, a_high, b_low[0], b_low[1]);
    mma_tf32(d, a_high, b_high[0], b_high[1]);
  }
};

template <class T>
GOHSP_BOTH constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
GOHSP_BOTH constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

// N neighbours as elements of T, in one store.
template <int N>
GOHSP_DEVICE void store_numbers(float* to, const Numbers<N>& numbers) {
  store_global(reinterpret_cast<Numbers<N>*>(to), numbers);
}

template <class T, int N>
GOHSP_DEVICE void store_numbers(T* to, const Numbers<N>& numbers) {
  struct alignas(2 * N) Pairs {
    uint32_t of[N / 2];
  } pairs;
  GOHSP_UNROLL
  for (int i = 0; i < N / 2; ++i) pairs.of[i] = pack2<T>(numbers.of[2 * i], numbers.of[2 * i + 1]);
  store_global(reinterpret_cast<Pairs*>(to), pairs);
}

GOHSP_DEVICE float sum_of_warp(float x) {
  GOHSP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace gohsp::cuda
