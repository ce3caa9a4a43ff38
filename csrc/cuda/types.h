// SPDX-License-Identifier: Apache-2.0
// Numbers of 16 bits as the kernels store them. How they convert is in device.cuh: PTX, or its emulation.
#pragma once

#include <cstdint>

namespace gohsp::cuda {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

struct alignas(8) Float2 {
  float x, y;
};

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

template <int N>
struct alignas(16) Numbers {
  float of[N];
};

// Neighbours in memory, accessed together.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

}  // namespace gohsp::cuda
