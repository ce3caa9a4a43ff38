// SPDX-License-Identifier: Apache-2.0
// A pruned Vision Transformer as gohsp.save writes it, packed for the CPU kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
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

class Model {
 public:
  explicit Model(const std::string& directory) : file_(directory + "/model.safetensors") {
    const json::Value plan = json::parse(read_file(directory + "/plan.json"));
    const json::Value &made = plan.at("model").at("arguments"), &mask = plan.at("mask");
    refuse_what_is_not_read_here(plan.at("model").at("class"), made);
    const json::Value& geometry = mask.at("geometry");
    dim_ = geometry.at("dim").size();
    heads_ = geometry.at("num_heads").size();
    head_dim_ = geometry.at("head_dim").size();
    eps_ = static_cast<float>(made.at("norm_eps").number());
    activation_ = activation(made.at("activation").text);
    embed_ = pack(Affine(file_, "patch_embed.proj"));
    head_ = pack(Affine(file_, "head"));
    const auto& blocks = mask.at("blocks").items;
    for (size_t i = 0; i < blocks.size(); ++i) add_block("blocks." + std::to_string(i) + ".", blocks[i]);
    for (size_t i = 0; i < attentions_.size(); ++i) {
      layers_.push_back({&attentions_[i], nullptr});
      layers_.push_back({nullptr, &mlps_[i]});
    }
  }

  // Logits [images, classes] of images [images, 3, height, width].
  Tensor operator()(const Tensor& images, const gohsp::Parallel& parallel) const {
    const Tensor x = tokens(images, parallel);
    const int64_t count = static_cast<int64_t>(x.shape[0]), features = static_cast<int64_t>(dim_);
    const gohsp::Shape shape{count, static_cast<int64_t>(x.shape[1]), features, 1};  // the class token is enough
    std::vector<float> out(count * dim_);
    gohsp::kernels().sublayers(layers_.data(), layers_.size(), x.data.data(), out.data(), shape, parallel);
    const Tensor gain = file_.get("norm.weight"), shift = file_.get("norm.bias");
    for (int64_t i = 0; i < count; ++i) normalise(out.data() + i * dim_, gain, shift);
    Tensor logits{{static_cast<size_t>(count), static_cast<size_t>(head_.n)}, {}};
    logits.data.resize(count * head_.n);
    linear(head_, out.data(), count, logits.data.data(), parallel);
    return logits;
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

  static gohsp::Activation activation(const std::string& name) {
    const char* names[] = {"identity", "gelu", "gelu_tanh", "relu", "silu", "quick_gelu"};
    for (int64_t i = 0; i < gohsp::kActivations; ++i)
      if (name == names[i]) return static_cast<gohsp::Activation>(i);
    throw std::runtime_error("plan.json: unknown activation " + name);
  }

  // Rows `first` to `first + count` as panels; they live as long as the model.
  gohsp::Matrix pack(const Affine& m, size_t first, size_t count) {
    const auto begin = m.weight.begin() + first * m.k;
    const std::vector<float> weight(begin, begin + count * m.k);
    const std::vector<float> bias(m.bias.begin() + first, m.bias.begin() + first + count);
    const int64_t n = static_cast<int64_t>(count), k = static_cast<int64_t>(m.k);
    panels_.emplace_back(gohsp::kernels().packed_size(n, k));
    gohsp::kernels().pack(weight.data(), bias.data(), n, k, panels_.back().data());
    return {panels_.back().data(), n, k};
  }

  gohsp::Matrix pack(const Affine& m) { return pack(m, 0, m.n); }

  const std::vector<int64_t>& keep(std::vector<int64_t> numbers) {
    lists_.push_back(std::move(numbers));
    return lists_.back();
  }

  gohsp::Columns columns(const std::vector<int64_t>& kept) const {
    return {static_cast<int64_t>(kept.size()), kept.data(), kept.size() == dim_};
  }

  void add_block(const std::string& name, const json::Value& mask) {
    const auto kept = [&](const char* part) -> const std::vector<int64_t>& {
      return keep(ranges(mask.at(part).text, dim_));
    };
    std::vector<int64_t> qk_widths, v_widths;
    for (int64_t head : ranges(mask.at("heads").text, heads_)) {
      qk_widths.push_back(static_cast<int64_t>(ranges(mask.at("qk").items.at(head).text, head_dim_).size()));
      v_widths.push_back(static_cast<int64_t>(ranges(mask.at("v").items.at(head).text, head_dim_).size()));
    }
    size_t n_qk = 0;
    for (int64_t width : qk_widths) n_qk += width;

    gohsp::Attention a{};
    const auto &attn_in = kept("attn_in"), &attn_out = kept("attn_out");
    Affine qkv(file_, name + "attn.qkv"), proj(file_, name + "attn.proj");
    qkv.fold_norm(file_, name + "norm1", attn_in);
    qkv.scale(0, n_qk, 1.0 / std::sqrt(static_cast<double>(head_dim_)));  // of the width before pruning
    proj.fold_layer_scale(file_, name + "ls1");
    a.q = pack(qkv, 0, n_qk);
    a.k = pack(qkv, n_qk, n_qk);
    a.v = pack(qkv, 2 * n_qk, qkv.n - 2 * n_qk);
    a.proj = pack(proj);
    a.heads.count = static_cast<int64_t>(qk_widths.size());
    a.heads.qk_widths = keep(std::move(qk_widths)).data();
    a.heads.v_widths = keep(std::move(v_widths)).data();
    a.heads.scale = 1.0f;
    a.in = columns(attn_in);
    a.out = columns(attn_out);
    a.eps = eps_;
    attentions_.push_back(a);

    gohsp::Mlp m{};
    const auto &mlp_in = kept("mlp_in"), &mlp_out = kept("mlp_out");
    Affine fc1(file_, name + "mlp.fc1"), fc2(file_, name + "mlp.fc2");
    fc1.fold_norm(file_, name + "norm2", mlp_in);
    fc2.fold_layer_scale(file_, name + "ls2");
    m.fc1 = pack(fc1);
    m.fc2 = pack(fc2);
    m.in = columns(mlp_in);
    m.out = columns(mlp_out);
    m.activation = activation_;
    m.eps = eps_;
    mlps_.push_back(m);
  }

  void linear(const gohsp::Matrix& weight, const float* x, int64_t rows, float* y,
              const gohsp::Parallel& parallel) const {
    const gohsp::Columns in{weight.k, nullptr, true}, out{weight.n, nullptr, true};
    gohsp::kernels().linear(weight, in, out, gohsp::Activation::identity, x, rows, weight.k, y, weight.n, parallel);
  }

  // Class token and patches, each with its position: [images, tokens, features].
  Tensor tokens(const Tensor& images, const gohsp::Parallel& parallel) const {
    const std::vector<size_t> kernel = file_.get("patch_embed.proj.weight").shape;  // [features, 3, side, side]
    const Tensor position = file_.get("pos_embed"), token = file_.get("cls_token");
    if (images.shape.size() != 4 || images.shape[1] != kernel[1]) throw std::runtime_error("images: wanted 4 axes");
    const size_t count = images.shape[0], channels = kernel[1], height = images.shape[2], width = images.shape[3];
    const size_t side = kernel[2], across = width / side, patches = height / side * across;
    if (position.shape[1] != patches + 1) throw std::runtime_error("images: wanted the size of the saved model");

    std::vector<float> pixels, embedded(count * patches * dim_);
    pixels.reserve(count * patches * channels * side * side);
    for (size_t i = 0; i < count; ++i)
      for (size_t p = 0; p < patches; ++p)
        for (size_t c = 0; c < channels; ++c)
          for (size_t y = 0; y < side; ++y) {
            const size_t row = (i * channels + c) * height + p / across * side + y;
            const auto first = images.data.begin() + row * width + p % across * side;
            pixels.insert(pixels.end(), first, first + side);
          }
    linear(embed_, pixels.data(), count * patches, embedded.data(), parallel);

    Tensor x{{count, patches + 1, dim_}, {}};
    x.data.resize(count * (patches + 1) * dim_);
    for (size_t i = 0; i < count; ++i)
      for (size_t t = 0; t <= patches; ++t) {
        const float* from = t == 0 ? token.data.data() : embedded.data() + (i * patches + t - 1) * dim_;
        float* to = x.data.data() + (i * (patches + 1) + t) * dim_;
        for (size_t d = 0; d < dim_; ++d) to[d] = from[d] + position.data[t * dim_ + d];
      }
    return x;
  }

  void normalise(float* row, const Tensor& gain, const Tensor& shift) const {
    double mean = 0, variance = 0;
    for (size_t d = 0; d < dim_; ++d) mean += row[d] / static_cast<double>(dim_);
    for (size_t d = 0; d < dim_; ++d) variance += (row[d] - mean) * (row[d] - mean) / static_cast<double>(dim_);
    const double rstd = 1.0 / std::sqrt(variance + eps_);
    for (size_t d = 0; d < dim_; ++d)
      row[d] = static_cast<float>((row[d] - mean) * rstd * gain.data[d] + shift.data[d]);
  }

  Tensors file_;
  size_t dim_ = 0, heads_ = 0, head_dim_ = 0;
  float eps_ = 0;
  gohsp::Activation activation_{};
  gohsp::Matrix embed_{}, head_{};
  // Deques: what the sublayers point to stays where it is.
  std::deque<std::vector<float>> panels_;
  std::deque<std::vector<int64_t>> lists_;
  std::deque<gohsp::Attention> attentions_;
  std::deque<gohsp::Mlp> mlps_;
  std::vector<gohsp::Sublayer> layers_;
};

}  // namespace example
