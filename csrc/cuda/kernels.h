// SPDX-License-Identifier: Apache-2.0
// Interface of the CUDA kernels: plain structs and pointers, no torch, no CUDA header. All pointers are to memory of the
// GPU. Rows that a matrix product reads begin at multiples of 16 bytes; sublayers.cpp sees to that.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/wire.h"
#include "types.h"

namespace gohsp::cuda {

// What is multiplied, always with sums in float32. float32 activations are multiplied as tf32, or as three products of
// tf32 whose sum is as good as float32. The numbers are those of PRECISIONS in gohsp_kernels/cuda.py.
enum class Precision : int64_t { f16, bf16, tf32, f32 };
constexpr int64_t kPrecisions = 4;

inline int64_t element_bytes(Precision p) { return p == Precision::f16 || p == Precision::bf16 ? 2 : 4; }

using Stream = void*;  // cudaStream_t

constexpr int kChunkBytes = 16;  // what one thread copies at a time
constexpr int kWidestHead = 128;
constexpr int kPartial = 32;  // columns of which a product leaves mean and sum of squares, for the LayerNorm after it

// A copy of each row's columns, normalised or not.
struct RowsParams {
  const void* x;  // [rows, features]
  int64_t rows;
  int32_t features;
  bool aligned;    // rows of x begin at multiples of 16 bytes
  bool normalise;  // the copy
  float eps;
  void* copy;              // [rows, copy_stride], zero from column `count` on
  const int32_t* columns;  // [count], or nullptr: the first `count`
  int32_t count;
  int32_t copy_stride;
};

// out[:, out_columns] = residual[:, out_columns] + scale * act(norm(x) W^T + bias); other columns: the residual, or 0.
struct LinearParams {
  const void* x;             // rows of x_stride elements
  const void* weight;        // [n, 16-byte chunks], zero where a column of x is pruned
  const int32_t* in_chunks;  // [chunks], of a row of x; nullptr: 0, 1, 2, ...
  int32_t chunks;
  int64_t x_stride;
  int64_t rows;
  int32_t n;
  const float* bias;     // [n] or nullptr, like the next two
  const float* row_sum;  // sums of the weight's rows; given when x is to be normalised
  const float* scale;
  const Float2* partials;  // [rows, features / kPartial] of x; nullptr: LayerNorm's statistics are found from the rows
  int32_t features;        // of x, for the statistics
  float eps;
  Activation activation;
  const int32_t* out_columns;  // [out_features]: the n computed ones, then the others; nullptr: all, in order
  int32_t out_features;
  int64_t out_stride;
  void* out;                // may be the residual itself: then the other columns are left alone
  const void* residual;     // rows of out_stride elements, or nullptr
  int32_t tokens, queries;  // row r of out belongs to row (r / queries) * tokens + r % queries of the residual
  bool paired;              // neighbours in a row of out and residual may be accessed together
  bool wide;                // 16 bytes of them: columns in order, rows that begin at multiples of 16 bytes
  Float2* partials_out;     // [rows, n / kPartial] of out, or nullptr; with `wide` only
};

// Attention proper, over heads of any widths.
struct AttentionParams {
  const void* qkv;       // [images, tokens, qkv_stride]
  void* out;             // [images, queries, out_stride]
  const int32_t* heads;  // [heads, 6]: first q, k, v and out channel, QK width, V width
  const float* qk_norm;  // [4, QK width]: weight and bias of q, then of k; nullptr: none
  int64_t images;
  int32_t head_count, tokens, queries;
  int64_t qkv_stride, out_stride;
  float scale;
  float eps;
  bool aligned;  // starts and strides are multiples of 16 bytes, and what fills a head's last 16 bytes is zero
  // Tiles of 16 queries in a block, and warps that share the keys of each: launch_attention chooses them.
  int32_t tiles, parts;
};

// A checksum of each of some pieces of memory: see checksum.cuh.
struct ChecksumParams {
  const int64_t* pieces;  // [count, 2]: address and bytes
  uint64_t* sums;         // [count]
};

// Each starts one kernel on `stream`, or none where there is nothing to do. `follows`: the launch before it on the
// stream is one of these, of the same call; then it may begin before that one has ended (and waits for its results
// where it needs them). Throws std::runtime_error.
void launch_rows(Precision precision, const RowsParams& params, Stream stream, bool follows);
void launch_linear(Precision precision, const LinearParams& params, Stream stream, bool follows);
// Parts of launch_linear: float32, and 16 bits on one generation of GPUs.
void launch_linear_float(Precision precision, const LinearParams& params, Stream stream, bool follows);
#define GOHSP_LINEAR_FORM(name, ...) \
  bool launch_linear_##name(Precision precision, const LinearParams& params, Stream stream, bool follows);
#include "linear_forms.def"
#undef GOHSP_LINEAR_FORM
void launch_attention(Precision precision, int64_t widest, const AttentionParams& params, Stream stream, bool follows);

void launch_checksum(const ChecksumParams& params, int64_t count, Stream stream);

// --- sublayers -------------------------------------------------------------------------------------------------------
struct Input {
  InputForm form;
  const int32_t* list;  // of chunks, or of columns to copy; nullptr: all
  int64_t count;        // columns, for the copy
};

struct Output {
  const int32_t* columns;  // [features]: kept, then the others; nullptr: all kept
};

struct Matrix {
  const void* weight;  // [n, chunks of 16 bytes]
  const float* bias;
  const float* row_sum;
  const float* scale;
  int64_t n;
  int64_t chunks;
};

struct Attention {
  Matrix qkv, proj;
  Input in;
  Output out;
  const int32_t* heads;  // [head_count, 6]
  const float* qk_norm;
  int64_t head_count, widest;
  float scale, eps, qk_eps;
};

struct Mlp {
  Matrix fc1, fc2;
  Input in;
  Output out;
  Activation activation;
  float eps;
};

// One of the two is set.
struct Sublayer {
  const Attention* attention;
  const Mlp* mlp;
};

struct Shape {
  int64_t images, tokens, features;
  int64_t queries;  // the first so many tokens of each image are wanted at the end
};

// Bytes of scratch memory that run_sublayers needs. Needs no GPU.
size_t workspace_bytes(Precision precision, const Sublayer* layers, int64_t count, const Shape& shape);

// y = sublayers(x), launched one after another on `stream`. x: [images, tokens, features], y: [images, queries,
// features], both beginning at multiples of 16 bytes. The chain needs an attention where queries < tokens.
void run_sublayers(Precision precision, const Sublayer* layers, int64_t count, const void* x, void* y,
                   const Shape& shape, void* workspace, Stream stream);

// activation(x W^T + b) scattered over [rows, out_features]; zero elsewhere. Workspace: linear_workspace_bytes.
size_t linear_workspace_bytes(Precision precision, const Input& in, const Matrix& weight, int64_t rows);
void run_linear(Precision precision, const Matrix& weight, const Input& in, const Output& out, Activation activation,
                const void* x, int64_t rows, int64_t features, void* y, int64_t out_features, void* workspace,
                Stream stream);

}  // namespace gohsp::cuda
