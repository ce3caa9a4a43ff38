// SPDX-License-Identifier: Apache-2.0
// The encoder on the CPU kernels: all blocks in one call.
#pragma once

#include <deque>

#include "model.h"

namespace example {

class CpuEncoder {
 public:
  CpuEncoder(const CpuEncoder&) = delete;

  explicit CpuEncoder(const Model& model) : dim_(model.dim) {
    for (const Block& block : model.blocks) {
      add_attention(block, model.eps);
      add_mlp(block, model.eps, model.activation);
    }
  }

  Tensor operator()(const Tensor& x) const {
    const int64_t images = static_cast<int64_t>(x.shape[0]), tokens = static_cast<int64_t>(x.shape[1]);
    const gohsp::Shape shape{images, tokens, static_cast<int64_t>(dim_), 1};  // the class token is enough
    Tensor y{{x.shape[0], dim_}, std::vector<float>(x.shape[0] * dim_)};
    gohsp::kernels().sublayers(layers_.data(), layers_.size(), x.data.data(), y.data.data(), shape, all_cores());
    return y;
  }

 private:
  void add_attention(const Block& block, float eps) {
    const size_t qk = block.qk_channels();
    gohsp::Attention a{};
    a.q = pack(block.qkv, 0, qk);
    a.k = pack(block.qkv, qk, qk);
    a.v = pack(block.qkv, 2 * qk, block.qkv.n - 2 * qk);
    a.proj = pack(block.proj, 0, block.proj.n);
    a.heads.count = static_cast<int64_t>(block.qk_widths.size());
    a.heads.qk_widths = block.qk_widths.data();
    a.heads.v_widths = block.v_widths.data();
    a.heads.scale = 1.0f;  // the weights of q hold it
    a.in = columns(block.attn_in, gohsp::Direction::gather);
    a.out = columns(block.attn_out, gohsp::Direction::scatter);
    a.eps = eps;
    attentions_.push_back(a);
    layers_.push_back({&attentions_.back(), nullptr});
  }

  void add_mlp(const Block& block, float eps, gohsp::Activation activation) {
    gohsp::Mlp m{};
    m.fc1 = pack(block.fc1, 0, block.fc1.n);
    m.fc2 = pack(block.fc2, 0, block.fc2.n);
    m.in = columns(block.mlp_in, gohsp::Direction::gather);
    m.out = columns(block.mlp_out, gohsp::Direction::scatter);
    m.activation = activation;
    m.eps = eps;
    mlps_.push_back(m);
    layers_.push_back({nullptr, &mlps_.back()});
  }

  gohsp::Matrix pack(const Affine& m, size_t first, size_t count) {
    panels_.push_back(panels(m, first, count));
    return {panels_.back().data(), static_cast<int64_t>(count), static_cast<int64_t>(m.k)};
  }

  gohsp::Columns columns(const std::vector<int64_t>& kept, gohsp::Direction direction) {
    const int64_t count = static_cast<int64_t>(kept.size()), features = static_cast<int64_t>(dim_);
    if (count == features) return {count, nullptr};
    plans_.emplace_back(gohsp::kernels().plan_bytes(features) / sizeof(int64_t));
    gohsp::kernels().plan(kept.data(), count, features, direction, plans_.back().data());
    return {count, plans_.back().data()};
  }

  size_t dim_;
  // Deques: what the sublayers point to stays where it is.
  std::deque<std::vector<float>> panels_;
  std::deque<std::vector<int64_t>> plans_;
  std::deque<gohsp::Attention> attentions_;
  std::deque<gohsp::Mlp> mlps_;
  std::vector<gohsp::Sublayer> layers_;
};

}  // namespace example
