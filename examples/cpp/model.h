// SPDX-License-Identifier: Apache-2.0
// A pruned Vision Transformer as gohsp.save writes it: its files, the constants folded into its matrices, and all that
// stands outside the encoder.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "json.h"

namespace example {

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

struct Tensor {
  std::vector<size_t> shape;
  std::vector<float> data;

  size_t rows() const { return shape.at(0); }
};

// The float32 tensors of a safetensors file: the length of a JSON header, the header, the numbers.
class Tensors {
 public:
  explicit Tensors(const std::string& path) : bytes_(read_file(path)) {
    uint64_t length = 0;
    if (bytes_.size() < sizeof length) throw std::runtime_error(path + ": is no safetensors file");
    std::memcpy(&length, bytes_.data(), sizeof length);
    if (length > bytes_.size() - sizeof length) throw std::runtime_error(path + ": is no safetensors file");
    header_ = json::parse(bytes_.substr(sizeof length, length));
    first_ = sizeof length + length;
  }

  bool has(const std::string& name) const { return header_.members.count(name) > 0; }

  Tensor get(const std::string& name) const {
    const json::Value& entry = header_.at(name);
    if (!entry.at("dtype").is("F32")) throw std::runtime_error(name + ": wanted float32");
    Tensor t;
    size_t count = 1;
    for (const json::Value& n : entry.at("shape").items) {
      t.shape.push_back(n.size());
      count *= t.shape.back();
    }
    const size_t begin = first_ + entry.at("data_offsets").items.at(0).size();
    if (begin + count * sizeof(float) > bytes_.size()) throw std::runtime_error(name + ": ends past the file");
    t.data.resize(count);
    std::memcpy(t.data.data(), bytes_.data() + begin, count * sizeof(float));
    return t;
  }

 private:
  std::string bytes_;
  json::Value header_;
  size_t first_;
};

// "0-2,5" as 0, 1, 2, 5, and "all" as 0 to size - 1.
inline std::vector<int64_t> ranges(const std::string& text, size_t size) {
  std::vector<int64_t> numbers;
  std::istringstream parts(text == "all" ? "0-" + std::to_string(size - 1) : text);
  for (std::string part; std::getline(parts, part, ',');) {
    const size_t dash = part.find('-');
    const int64_t first = std::stoll(part),
                  last = dash == std::string::npos ? first : std::stoll(part.substr(dash + 1));
    for (int64_t n = first; n <= last; ++n) numbers.push_back(n);
  }
  return numbers;
}

// A matrix [n, k] and its bias while constants are folded into them, in double.
struct Affine {
  size_t n, k;
  std::vector<double> weight, bias;

  Affine(const Tensors& file, const std::string& name) {
    const Tensor w = file.get(name + ".weight");
    n = w.rows();
    k = n == 0 ? 0 : w.data.size() / n;
    weight.assign(w.data.begin(), w.data.end());
    bias.assign(n, 0.0);
    if (file.has(name + ".bias")) {
      const Tensor b = file.get(name + ".bias");
      bias.assign(b.data.begin(), b.data.end());
    }
  }

  // Takes over the scale and shift of the LayerNorm before it, whose columns `cols` are read.
  void fold_norm(const Tensors& file, const std::string& norm, const std::vector<int64_t>& cols) {
    const Tensor gain = file.get(norm + ".weight"), shift = file.get(norm + ".bias");
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < k; ++j) {
        double& w = weight[i * k + j];
        bias[i] += w * shift.data[cols[j]];
        w *= gain.data[cols[j]];
      }
  }

  // Multiplies `count` outputs from `first` on.
  void scale(size_t first, size_t count, double factor) {
    for (size_t i = first; i < first + count; ++i) {
      for (size_t j = 0; j < k; ++j) weight[i * k + j] *= factor;
      bias[i] *= factor;
    }
  }

  void fold_layer_scale(const Tensors& file, const std::string& name) {
    if (!file.has(name + ".gamma")) return;
    const Tensor gamma = file.get(name + ".gamma");
    for (size_t i = 0; i < n; ++i) scale(i, 1, gamma.data[i]);
  }
};

inline void run_in_threads(int64_t workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

inline gohsp::Parallel all_cores() {
  return {std::max<int64_t>(1, std::thread::hardware_concurrency()), run_in_threads};
}

// Outputs `first` to `first + count` of a matrix as panels of the CPU kernels.
inline std::vector<float> panels(const Affine& m, size_t first, size_t count) {
  const auto begin = m.weight.begin() + first * m.k;
  const std::vector<float> weight(begin, begin + count * m.k);
  const std::vector<float> bias(m.bias.begin() + first, m.bias.begin() + first + count);
  const int64_t n = static_cast<int64_t>(count), k = static_cast<int64_t>(m.k);
  constexpr auto kFormat = gohsp::Format::float32;
  std::vector<float> packed(gohsp::kernels().packed_bytes(kFormat, n, k) / sizeof(float));
  gohsp::kernels().pack(kFormat, {weight.data(), nullptr, bias.data(), n, k}, packed.data());
  return packed;
}

// x W^T + b for `rows` rows, on the CPU.
inline Tensor linear(const Affine& m, const std::vector<float>& x, size_t rows) {
  const std::vector<float> packed = panels(m, 0, m.n);
  const int64_t n = static_cast<int64_t>(m.n), k = static_cast<int64_t>(m.k);
  Tensor y{{rows, m.n}, std::vector<float>(rows * m.n)};
  gohsp::kernels().linear({packed.data(), n, k}, {k, nullptr}, {n, nullptr}, gohsp::Activation::identity, x.data(),
                          static_cast<int64_t>(rows), k, y.data.data(), n, all_cores());
  return y;
}

// What is kept of one block, its constants folded.
struct Block {
  Affine qkv, proj, fc1, fc2;
  std::vector<int64_t> attn_in, attn_out, mlp_in, mlp_out;
  std::vector<int64_t> qk_widths, v_widths;  // of the heads that are left

  int64_t qk_channels() const { return std::accumulate(qk_widths.begin(), qk_widths.end(), int64_t{0}); }
  int64_t v_channels() const { return std::accumulate(v_widths.begin(), v_widths.end(), int64_t{0}); }
};

struct Model {
  Tensors file;
  size_t dim, heads, head_dim;
  float eps;
  gohsp::Activation activation;
  std::vector<Block> blocks;

  explicit Model(const std::string& directory) : file(directory + "/model.safetensors") {
    const json::Value plan = json::parse(read_file(directory + "/plan.json"));
    const json::Value &made = plan.at("model").at("arguments"), &mask = plan.at("mask");
    refuse_what_is_not_read_here(plan.at("model").at("class"), made);
    const json::Value& geometry = mask.at("geometry");
    dim = geometry.at("dim").size();
    heads = geometry.at("num_heads").size();
    head_dim = geometry.at("head_dim").size();
    eps = static_cast<float>(made.at("norm_eps").number());
    activation = activation_of(made.at("activation").text);
    for (const json::Value& block : mask.at("blocks").items) add_block(block);
  }

  // Logits [images, classes] of images [images, 3, height, width]. The encoder takes [images, tokens, features] and
  // gives the class tokens [images, features].
  template <class Encoder>
  Tensor logits(const Tensor& images, const Encoder& encoder) const {
    Tensor x = encoder(tokens(images));
    const Tensor gain = file.get("norm.weight"), shift = file.get("norm.bias");
    for (size_t i = 0; i < x.rows(); ++i) normalise(x.data.data() + i * dim, gain, shift);
    return linear(Affine(file, "head"), x.data, x.rows());
  }

 private:
  static void refuse_what_is_not_read_here(const json::Value& type, const json::Value& made) {
    const std::map<std::string, std::string> wanted = {
        {"global_pool", "token"},    {"class_token", "true"}, {"pos_embed", "learn"},
        {"no_embed_class", "false"}, {"reg_tokens", "0"},     {"pre_norm", "false"},
        {"final_norm", "true"},      {"fc_norm", "false"},    {"qk_norm", "false"}};
    if (!type.is("VisionTransformer")) throw std::runtime_error("plan.json: wanted a VisionTransformer");
    for (const auto& [key, value] : wanted)
      if (!made.at(key).is(value.c_str()))
        throw std::runtime_error("plan.json: this example reads models with " + key + " = " + value);
  }

  static gohsp::Activation activation_of(const std::string& name) {
    const char* names[] = {"identity", "gelu", "gelu_tanh", "relu", "silu", "quick_gelu"};
    for (int64_t i = 0; i < gohsp::kActivations; ++i)
      if (name == names[i]) return static_cast<gohsp::Activation>(i);
    throw std::runtime_error("plan.json: unknown activation " + name);
  }

  void add_block(const json::Value& mask) {
    const std::string name = "blocks." + std::to_string(blocks.size()) + ".";
    const auto kept = [&](const char* part) { return ranges(mask.at(part).text, dim); };
    Block b{Affine(file, name + "attn.qkv"),
            Affine(file, name + "attn.proj"),
            Affine(file, name + "mlp.fc1"),
            Affine(file, name + "mlp.fc2"),
            kept("attn_in"),
            kept("attn_out"),
            kept("mlp_in"),
            kept("mlp_out"),
            {},
            {}};
    for (int64_t head : ranges(mask.at("heads").text, heads)) {
      b.qk_widths.push_back(static_cast<int64_t>(ranges(mask.at("qk").items.at(head).text, head_dim).size()));
      b.v_widths.push_back(static_cast<int64_t>(ranges(mask.at("v").items.at(head).text, head_dim).size()));
    }
    b.qkv.fold_norm(file, name + "norm1", b.attn_in);
    b.qkv.scale(0, b.qk_channels(), 1.0 / std::sqrt(static_cast<double>(head_dim)));  // of the width before pruning
    b.proj.fold_layer_scale(file, name + "ls1");
    b.fc1.fold_norm(file, name + "norm2", b.mlp_in);
    b.fc2.fold_layer_scale(file, name + "ls2");
    blocks.push_back(std::move(b));
  }

  // Class token and patches, each with its position: [images, tokens, features].
  Tensor tokens(const Tensor& images) const {
    const std::vector<size_t> kernel = file.get("patch_embed.proj.weight").shape;  // [features, 3, side, side]
    const Tensor position = file.get("pos_embed"), token = file.get("cls_token");
    if (images.shape.size() != 4 || images.shape[1] != kernel[1]) throw std::runtime_error("images: wanted 4 axes");
    const size_t count = images.shape[0], channels = kernel[1], height = images.shape[2], width = images.shape[3];
    const size_t side = kernel[2], across = width / side, patches = height / side * across;
    if (position.shape[1] != patches + 1) throw std::runtime_error("images: wanted the size of the saved model");

    std::vector<float> pixels;
    pixels.reserve(count * patches * channels * side * side);
    for (size_t i = 0; i < count; ++i)
      for (size_t p = 0; p < patches; ++p)
        for (size_t c = 0; c < channels; ++c)
          for (size_t y = 0; y < side; ++y) {
            const size_t row = (i * channels + c) * height + p / across * side + y;
            const auto first = images.data.begin() + row * width + p % across * side;
            pixels.insert(pixels.end(), first, first + side);
          }
    const Tensor embedded = linear(Affine(file, "patch_embed.proj"), pixels, count * patches);

    Tensor x{{count, patches + 1, dim}, {}};
    x.data.resize(count * (patches + 1) * dim);
    for (size_t i = 0; i < count; ++i)
      for (size_t t = 0; t <= patches; ++t) {
        const float* from = t == 0 ? token.data.data() : embedded.data.data() + (i * patches + t - 1) * dim;
        float* to = x.data.data() + (i * (patches + 1) + t) * dim;
        for (size_t d = 0; d < dim; ++d) to[d] = from[d] + position.data[t * dim + d];
      }
    return x;
  }

  void normalise(float* row, const Tensor& gain, const Tensor& shift) const {
    double mean = 0, variance = 0;
    for (size_t d = 0; d < dim; ++d) mean += row[d] / static_cast<double>(dim);
    for (size_t d = 0; d < dim; ++d) variance += (row[d] - mean) * (row[d] - mean) / static_cast<double>(dim);
    const double rstd = 1.0 / std::sqrt(variance + eps);
    for (size_t d = 0; d < dim; ++d) row[d] = static_cast<float>((row[d] - mean) * rstd * gain.data[d] + shift.data[d]);
  }
};

}  // namespace example
