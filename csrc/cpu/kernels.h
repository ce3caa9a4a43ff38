// SPDX-License-Identifier: Apache-2.0
// Interface of the CPU kernels: plain structs and pointers, no torch. All floats are fp32, all rows are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/wire.h"

namespace gohsp {

// Raise this when packed weights or columns are arranged in another way than before.
constexpr uint64_t kPackingVersion = 6;

// A number for the arrangement of weights of this format, and of columns, that the kernels of this name read (FNV-1a of
// name, format and version). Packed layouts begin with it. Not negative.
constexpr int64_t packing_of(const char* name, Format format) {
  uint64_t hash = 0xcbf29ce484222325u ^ (kPackingVersion << 8 | static_cast<uint64_t>(format));
  for (; *name != '\0'; ++name) hash = (hash ^ static_cast<uint8_t>(*name)) * 0x100000001b3u;
  return static_cast<int64_t>(hash >> 1);
}

// A weight matrix [n, k] with its bias, packed into panels by KernelTable::pack.
struct Matrix {
  const void* panels;
  int64_t n;  // outputs
  int64_t k;  // inputs
  Format format = Format::float32;
};

// What is packed: weights [n, k] as the numbers of their format (float, int8_t, or uint16_t that hold the bits of a
// bfloat16).
struct Unpacked {
  const void* weight;
  const float* scales;  // [n], of int8
  const float* bias;    // [n], or nullptr
  int64_t n, k;
};

// Inputs of an int8 matrix at most: 255 * 127 * k must not leave an int32.
constexpr int64_t kMostInt8Inputs = 65536;

enum class Direction { gather, scatter };

// Kept columns of the residual stream.
struct Columns {
  int64_t count;
  const void* plan;  // by KernelTable::plan; nullptr: all are kept
};

enum class Norm : int64_t { layer, rms };

// Rotary positions: channels c and c + w / 2 of a head of w channels are turned together, token by token.
struct Rope {
  const float* angles = nullptr;  // [2, tokens, pairs], cosines and sines; nullptr: none
  int64_t tokens = 0;
  int64_t pairs = 0;  // of all heads, or of one where all have the same angles
};

// Added to the scores of each head, query and key. Images take the groups in turns: image i of a batch takes i % groups.
struct ScoreBias {
  const float* values = nullptr;  // [groups, heads, tokens, row_stride_of(tokens)], padded by anything; nullptr: none
  int64_t groups = 0;
  int64_t tokens = 0;

  // Rows begin on a multiple of the widest vector there is.
  static constexpr int64_t row_stride_of(int64_t tokens) { return (tokens + 15) / 16 * 16; }
};

struct Heads {
  int64_t count;
  const int64_t* qk_widths;  // [count]
  const int64_t* v_widths;   // [count]
  const float* qk_norm;      // [4, head width]: weight and bias for q, then for k; nullptr: none
  float qk_eps;
  float scale;              // applied to q here; 1 where the weights hold it already
  Norm norm = Norm::layer;  // of q and k
  Rope rope = {};
  ScoreBias bias = {};
  const float* cosine =
      nullptr;  // [count], factors of cosine attention, whose q and k have a length of 1; nullptr: none
};

// A norm in front of the last matrix of a sublayer (affine part folded away).
struct InnerNorm {
  int64_t features = 0;  // what it divides by, those included that were pruned, which are zeros; 0: none
  float eps = 0.0f;
};

// norm (affine part folded away), gather, q | k | v, softmax attention, inner norm, proj, scatter, residual. With a norm
// behind, there is none in front, and all columns are written: gather, ..., proj, norm, residual.
struct Attention {
  Matrix q, k, v, proj;
  Heads heads;
  Columns in, out;
  float eps;
  Norm norm = Norm::layer;
  InnerNorm inner = {};
  const float* behind = nullptr;  // [2, features], weight and bias of a norm behind proj; nullptr: it is in front
};

// norm (affine part folded away), gather, fc1, activation, inner norm, fc2, scatter, residual. A gate takes fc1's place in
// front of the activation, and what that gives is multiplied by what fc1 gives. A norm may be behind as of attention.
struct Mlp {
  Matrix fc1, fc2;
  Columns in, out;
  Activation activation;
  float eps;
  Norm norm = Norm::layer;
  InnerNorm inner = {};
  Matrix gate = {};  // without panels: none
  const float* behind = nullptr;
};

// One of the two is set.
struct Sublayer {
  const Attention* attention;
  const Mlp* mlp;
};

struct Shape {
  int64_t batch;
  int64_t tokens;
  int64_t features;
  int64_t queries;  // the first so many tokens of each image are wanted at the end
};

// Images [channels, height, width] as rows of patches, which lie side by side without overlap.
struct Patches {
  int64_t channels, height, width;
  int64_t patch_height, patch_width;

  int64_t across() const { return width / patch_width; }
  int64_t count() const { return height / patch_height * across(); }
  int64_t size() const { return channels * patch_height * patch_width; }
};

// Who runs the work: calls body(context, worker) for each worker in [0, workers), at the same time or one after another.
// The kernels wait only for work that a running worker has already taken, so either is safe.
struct Parallel {
  int64_t workers;
  void (*run)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);
};

struct KernelTable {
  const char* name;  // one of instruction_sets()

  // Bytes that a packed [n, k] matrix takes, and the packing. Panels lie on a multiple of 4.
  int64_t (*packed_bytes)(Format format, int64_t n, int64_t k);
  void (*pack)(Format format, const Unpacked& from, void* panels);

  // Bytes that a plan of kept columns takes, a multiple of 8, and the plan of `count` ascending ones in [0, features).
  int64_t (*plan_bytes)(int64_t features);
  void (*plan)(const int64_t* kept, int64_t count, int64_t features, Direction direction, void* plan);

  // Whether a plan has `count` columns of `features` and keeps reads and writes within them, whatever is in it.
  bool (*plan_fits)(const Columns& columns, int64_t features);

  // Activations that meet int8 weights become integers from 0 to this, row by row.
  int64_t activation_levels;

  // Whether queries, keys and values beside such weights are rounded to bfloat16, and what the softmax makes of scores.
  bool (*attends_in_pairs)(Format format);

  // How many times as fast as with float32 weights a product with bfloat16 weights is, measured in some 100 us; and
  // whether a set has nothing else over the one behind it in the list, so that it is chosen where this is a gain.
  double (*bfloat16_gain)();
  bool for_bfloat16;

  // y = sublayers(x). x: [batch, tokens, features], y: [batch, queries, features].
  void (*sublayers)(const Sublayer* layers, int64_t count, const float* x, float* y, const Shape& shape,
                    const Parallel& parallel);

  // y = base, plus patches W^T + b in its last rows. images: [batch, channels, height, width], base: [tokens, weight.n],
  // y: [batch, tokens, weight.n]. The first tokens - patches.count() rows are base's own.
  void (*embed)(const Matrix& weight, const Patches& patches, const float* images, int64_t batch, const float* base,
                int64_t tokens, float* y, const Parallel& parallel);

  // out[:, scatter] = activation(x[:, gather] W^T + b), zero elsewhere. x: [rows, features], y: [rows, out_features].
  void (*linear)(const Matrix& weight, const Columns& gather, const Columns& scatter, Activation activation,
                 const float* x, int64_t rows, int64_t features, float* y, int64_t out_features,
                 const Parallel& parallel);

  // Attention proper. qkv: [batch, tokens, sum of widths], y: [batch, queries, sum of v widths].
  void (*attention)(const Heads& heads, const float* qkv, const Shape& shape, float* y, const Parallel& parallel);

  // y = x W^T + b with rounded weights, for tests of its arithmetic. x: [rows, k], y: [rows, n].
  void (*rounded_product)(const Matrix& weight, const float* x, int64_t rows, float* y);

  // y[i] = activation(x[i]) and exp(x[i]), for tests of their accuracy.
  void (*apply)(Activation activation, const float* x, int64_t count, float* y);
  void (*exponential)(const float* x, int64_t count, float* y);

  // A number that changes with the bytes; see checksum.h.
  uint64_t (*checksum)(const void* data, int64_t bytes);
};

// The names of all instruction sets there are, whether this build and this machine have them or not; best first, and
// nullptr behind the last.
const char* const* instruction_sets();

// The table for this machine: the best instruction set that it has, or the one that the environment variable
// GOHSP_CPU_CAPABILITY names. Throws std::runtime_error where that one is unknown or cannot run here.
const KernelTable& kernels();

// The table of one instruction set, or nullptr where this build or this machine lacks it.
const KernelTable* kernels(const char* name);

// bfloat16_gain of this machine's set for bfloat16 products in vectors, measured once; 0 where it has none.
double bfloat16_gain_in_vectors();

// A block of at least `bytes` that stays with the calling thread and is handed out again on its next call: no
// allocation after the first call of a size. Aligned to 64 bytes. Throws std::bad_alloc.
void* workspace(size_t bytes);

// Lets another thread run, while waiting for its work.
void give_way();

}  // namespace gohsp
