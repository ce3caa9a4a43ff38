// SPDX-License-Identifier: Apache-2.0
// The numbers in packed layouts, which Python writes and C++ reads. Both take them from the lists here: C++ as enums,
// Python by name, from the library (gohsp_names in csrc/torch/cpu_ops.cpp).
#pragma once

#include <cstdint>

// Each list is a macro that applies X to every name in turn; a name's number is its place.
#define GOHSP_ACTIVATIONS(X) X(identity) X(gelu) X(gelu_tanh) X(relu) X(silu) X(quick_gelu)
// Weights: behind the name its struct in csrc/cpu/formats, torch's dtype of the numbers that are packed, and whether
// each output has a scale.
#define GOHSP_FORMATS(X)            \
  X(float32, Float32, Float, false) \
  X(int8, Int8, Char, true)         \
  X(bfloat16, BFloat16, BFloat16, false)
#define GOHSP_SUBLAYERS(X) X(attention) X(mlp)
// How a CUDA product reads the columns of its input: as they lie; 16 bytes at a time, by a list; or from a copy without
// the others, normalised where there is a norm.
#define GOHSP_CUDA_INPUTS(X) X(direct) X(chunks) X(copy)
// Vectors that a CUDA matrix may have. A layout holds the sum of their 1 << number.
#define GOHSP_CUDA_VECTORS(X) X(bias) X(row_sum) X(scale)

#define GOHSP_ENUMERATOR(name, ...) name,
#define GOHSP_COUNT(...) +1

namespace gohsp {

enum class Activation : int64_t { GOHSP_ACTIVATIONS(GOHSP_ENUMERATOR) };
constexpr int64_t kActivations = GOHSP_ACTIVATIONS(GOHSP_COUNT);

// What a packed CPU weight is made of.
enum class Format : int64_t { GOHSP_FORMATS(GOHSP_ENUMERATOR) };
constexpr int64_t kFormats = GOHSP_FORMATS(GOHSP_COUNT);

enum class SublayerKind : int64_t { GOHSP_SUBLAYERS(GOHSP_ENUMERATOR) };

// Constants of each sublayer, beside its layout: eps, eps of the q and k norms, softmax scale.
constexpr int64_t kConstants = 3;
// The same on the CPU, where the eps of the inner norm follows.
constexpr int64_t kCpuConstants = 4;

namespace cuda {
enum class InputForm : int64_t { GOHSP_CUDA_INPUTS(GOHSP_ENUMERATOR) };
enum class MatrixVector : int64_t { GOHSP_CUDA_VECTORS(GOHSP_ENUMERATOR) };
}  // namespace cuda

}  // namespace gohsp
