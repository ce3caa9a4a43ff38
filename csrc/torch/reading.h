// SPDX-License-Identifier: Apache-2.0
// What the operators of both native backends do with their arguments: read packed layouts number by number, check, and
// make the tensors of results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "../common/wire.h"

namespace gohsp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()});
}

inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Rows of a tensor [..., columns].
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// Sizes whose products stay far from the end of an int64; what is bigger is nobody's matrix.
constexpr int64_t kMostColumns = 1 << 24;
constexpr int64_t kMostElements = int64_t{1} << 36;

inline int64_t checked_features(int64_t features, const char* name) {
  STD_TORCH_CHECK(features >= 0 && features < kMostColumns, name, ": wanted 0 to ", kMostColumns - 1, " columns; got ",
                  features);
  return features;
}

inline void check_matrix(int64_t n, int64_t k, const char* name) {
  const bool fits = n >= 0 && n < kMostColumns && k >= 0 && k < kMostColumns && n * k <= kMostElements;
  STD_TORCH_CHECK(fits, name, ": wanted no negative and no gigantic sizes; got ", n, " outputs and ", k, " inputs");
}

// Hands out the elements of an array, one part behind the other.
template <class T>
class Reader {
 public:
  Reader(const T* begin, int64_t count, const char* name) : name_(name), next_(begin), end_(begin + count) {}

  const T* take(int64_t count) {
    STD_TORCH_CHECK(count >= 0 && count <= end_ - next_, name_, ": too short");
    const T* place = next_;
    next_ += count;
    return place;
  }

  T number() { return *take(1); }
  bool empty() const { return next_ == end_; }

 private:
  const char* name_;
  const T* next_;
  const T* end_;
};

inline Activation activation_of(int64_t id) {
  STD_TORCH_CHECK(id >= 0 && id < kActivations, "activation: wanted 0 to ", kActivations - 1, "; got ", id);
  return static_cast<Activation>(id);
}

inline SublayerKind kind_of(int64_t id) {
  const SublayerKind kind = static_cast<SublayerKind>(id);
  STD_TORCH_CHECK(kind == SublayerKind::attention || kind == SublayerKind::mlp, "layouts: unknown kind of sublayer ",
                  id);
  return kind;
}

// Sublayers of either kind in the order of a chain. Room for all is made first, so that pointers to them stay true.
template <class Attention, class Mlp, class Sublayer>
class Chain {
 public:
  explicit Chain(size_t count) {
    attentions_.reserve(count);
    mlps_.reserve(count);
  }

  void add(const Attention& attention) {
    attentions_.push_back(attention);
    layers_.push_back({&attentions_.back(), nullptr});
  }

  void add(const Mlp& mlp) {
    mlps_.push_back(mlp);
    layers_.push_back({nullptr, &mlps_.back()});
  }

  bool has_attention() const { return !attentions_.empty(); }
  const Sublayer* layers() const { return layers_.data(); }
  int64_t size() const { return static_cast<int64_t>(layers_.size()); }

 private:
  std::vector<Attention> attentions_;
  std::vector<Mlp> mlps_;
  std::vector<Sublayer> layers_;
};

}  // namespace gohsp
