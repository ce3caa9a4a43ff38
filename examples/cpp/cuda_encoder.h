// SPDX-License-Identifier: Apache-2.0
// The encoder on the CUDA kernels, in float32: all blocks launched by one call.
#pragma once

#include <cstring>
#include <deque>

#include "../../csrc/cuda/kernels.h"
#include "model.h"

#ifdef GOHSP_EMULATED
#include "../../csrc/cuda/emulate/block.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace example {

// Memory of the GPU; in emulation, memory that the kernels may use.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
#ifdef GOHSP_EMULATED
    place_ = ::operator new(bytes, std::align_val_t{16});
    gohsp::cuda::emulate::allow(place_, bytes);
#else
    check(cudaMalloc(&place_, bytes));
#endif
  }

  DeviceMemory(const DeviceMemory&) = delete;

  ~DeviceMemory() {
#ifdef GOHSP_EMULATED
    ::operator delete(place_, std::align_val_t{16});
#else
    cudaFree(place_);
#endif
  }

  void fill(const void* from) {
#ifdef GOHSP_EMULATED
    std::memcpy(place_, from, bytes_);
#else
    check(cudaMemcpy(place_, from, bytes_, cudaMemcpyHostToDevice));
#endif
  }

  // Waits for the kernels.
  void read(void* to) const {
#ifdef GOHSP_EMULATED
    std::memcpy(to, place_, bytes_);
#else
    check(cudaMemcpy(to, place_, bytes_, cudaMemcpyDeviceToHost));
#endif
  }

  void* place() const { return place_; }

 private:
#ifndef GOHSP_EMULATED
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
#endif

  size_t bytes_;
  void* place_ = nullptr;
};

class CudaEncoder {
 public:
  CudaEncoder(const CudaEncoder&) = delete;

  explicit CudaEncoder(const Model& model) : dim_(model.dim) {
    for (const Block& block : model.blocks) {
      add_attention(block, model.eps);
      add_mlp(block, model.eps, model.activation);
    }
  }

  Tensor operator()(const Tensor& x) const {
    const auto precision = gohsp::cuda::Precision::f32;
    const int64_t images = static_cast<int64_t>(x.shape[0]), tokens = static_cast<int64_t>(x.shape[1]);
    const gohsp::cuda::Shape shape{images, tokens, static_cast<int64_t>(dim_), 1};  // the class token is enough
    const int64_t count = static_cast<int64_t>(layers_.size());
    Tensor y{{x.shape[0], dim_}, std::vector<float>(x.shape[0] * dim_)};
    DeviceMemory in(x.data.size() * sizeof(float)), out(y.data.size() * sizeof(float));
    DeviceMemory scratch(gohsp::cuda::workspace_bytes(precision, layers_.data(), count, shape));
    in.fill(x.data.data());
    gohsp::cuda::run_sublayers(precision, layers_.data(), count, in.place(), out.place(), shape, scratch.place(),
                               nullptr);
    out.read(y.data.data());
    return y;
  }

 private:
  static constexpr size_t kChunk = 4;     // floats in 16 bytes
  static constexpr size_t kChannels = 8;  // heads begin at multiples of so many

  static size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

  // Row i of `m` becomes row rows[i] of n, and column j column columns[j]; what is between is zero.
  gohsp::cuda::Matrix matrix(const Affine& m, size_t n, const std::vector<size_t>& rows, size_t k,
                             const std::vector<size_t>& columns) {
    const size_t depth = round_up(k, kChunk);
    std::vector<float> weight(n * depth), bias(n);
    for (size_t i = 0; i < m.n; ++i) {
      for (size_t j = 0; j < m.k; ++j) weight[rows[i] * depth + columns[j]] = static_cast<float>(m.weight[i * m.k + j]);
      bias[rows[i]] = static_cast<float>(m.bias[i]);
    }
    gohsp::cuda::Matrix packed{};
    packed.weight = on_device(weight);
    packed.bias = static_cast<const float*>(on_device(bias));
    packed.n = static_cast<int64_t>(n);
    packed.chunks = static_cast<int64_t>(depth / kChunk);
    return packed;
  }

  static std::vector<size_t> in_order(size_t count) {
    std::vector<size_t> numbers(count);
    for (size_t i = 0; i < count; ++i) numbers[i] = i;
    return numbers;
  }

  // A head without V channels adds nothing, but costs little: it stays, so that this example stays simple.
  void add_attention(const Block& block, float eps) {
    // Heads move to channels that are multiples of 8.
    const size_t count = block.qk_widths.size();
    size_t qk = 0, v = 0, widest = 0;
    for (size_t h = 0; h < count; ++h) {
      qk += round_up(block.qk_widths[h], kChannels);
      v += round_up(block.v_widths[h], kChannels);
      widest =
          std::max<size_t>({widest, static_cast<size_t>(block.qk_widths[h]), round_up(block.v_widths[h], kChannels)});
    }
    // Where each channel goes among the rows of qkv (all of q, all of k, all of v) and the columns of proj.
    std::vector<int32_t> table;
    std::vector<size_t> q_rows, k_rows, v_rows, v_columns;
    size_t qk_start = 0, v_start = 0;
    for (size_t h = 0; h < count; ++h) {
      const size_t qk_width = block.qk_widths[h], v_width = block.v_widths[h];
      for (size_t c = 0; c < qk_width; ++c) q_rows.push_back(qk_start + c);
      for (size_t c = 0; c < qk_width; ++c) k_rows.push_back(qk + qk_start + c);
      for (size_t c = 0; c < v_width; ++c) v_rows.push_back(2 * qk + v_start + c);
      for (size_t c = 0; c < v_width; ++c) v_columns.push_back(v_start + c);
      for (size_t number : {qk_start, qk + qk_start, 2 * qk + v_start, v_start, qk_width, round_up(v_width, kChannels)})
        table.push_back(static_cast<int32_t>(number));
      qk_start += round_up(qk_width, kChannels);
      v_start += round_up(v_width, kChannels);
    }
    std::vector<size_t> rows = q_rows;
    rows.insert(rows.end(), k_rows.begin(), k_rows.end());
    rows.insert(rows.end(), v_rows.begin(), v_rows.end());

    gohsp::cuda::Attention a{};
    a.qkv = matrix(block.qkv, 2 * qk + v, rows, block.qkv.k, in_order(block.qkv.k));
    a.proj = matrix(block.proj, block.proj.n, in_order(block.proj.n), v, v_columns);
    a.in = input(block.attn_in);
    a.out = output(block.attn_out);
    a.heads = static_cast<const int32_t*>(on_device(table));
    a.head_count = static_cast<int64_t>(count);
    a.widest = static_cast<int64_t>(widest);
    a.scale = 1.0f;  // the weights of q hold it
    a.eps = eps;
    attentions_.push_back(a);
    layers_.push_back({&attentions_.back(), nullptr});
  }

  void add_mlp(const Block& block, float eps, gohsp::Activation activation) {
    const size_t hidden = round_up(block.fc1.n, kChannels);  // neurons of zero: every activation keeps zero
    gohsp::cuda::Mlp m{};
    m.fc1 = matrix(block.fc1, hidden, in_order(block.fc1.n), block.fc1.k, in_order(block.fc1.k));
    m.fc2 = matrix(block.fc2, block.fc2.n, in_order(block.fc2.n), hidden, in_order(block.fc2.k));
    m.in = input(block.mlp_in);
    m.out = output(block.mlp_out);
    m.activation = activation;
    m.eps = eps;
    mlps_.push_back(m);
    layers_.push_back({nullptr, &mlps_.back()});
  }

  // float32 reads normalised copies of the kept columns.
  gohsp::cuda::Input input(const std::vector<int64_t>& kept) {
    const std::vector<int32_t> list(kept.begin(), kept.end());
    return {gohsp::cuda::InputForm::copy, static_cast<const int32_t*>(on_device(list)),
            static_cast<int64_t>(kept.size())};
  }

  // The kept columns, then the others.
  gohsp::cuda::Output output(const std::vector<int64_t>& kept) {
    std::vector<int32_t> list(kept.begin(), kept.end());
    for (int32_t c = 0; c < static_cast<int32_t>(dim_); ++c)
      if (!std::binary_search(kept.begin(), kept.end(), c)) list.push_back(c);
    return {static_cast<const int32_t*>(on_device(list))};
  }

  template <class T>
  const void* on_device(const std::vector<T>& numbers) {
    memory_.emplace_back(numbers.size() * sizeof(T));
    memory_.back().fill(numbers.data());
    return memory_.back().place();
  }

  size_t dim_;
  // Deques: what the sublayers point to stays where it is.
  std::deque<DeviceMemory> memory_;
  std::deque<gohsp::cuda::Attention> attentions_;
  std::deque<gohsp::cuda::Mlp> mlps_;
  std::vector<gohsp::cuda::Sublayer> layers_;
};

}  // namespace example
