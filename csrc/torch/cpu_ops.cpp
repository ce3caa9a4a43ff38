// SPDX-License-Identifier: Apache-2.0
// Checks of arguments and registration of the native CPU operators, on the LibTorch stable ABI: one binary serves
// torch 2.10 and newer. The schemas are in gohsp_kernels/_schemas.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../cpu/kernels.h"

namespace {

using gohsp::Columns;
using gohsp::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* floats(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": wanted float32; got another dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": wanted a contiguous tensor");
  return static_cast<const float*>(t.const_data_ptr());
}

const int64_t* indices(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, ": wanted int64; got another dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": wanted a contiguous tensor");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Kernels trust the column lists, so their order and range are checked here, in time proportional to their length.
Columns columns(const std::optional<Tensor>& t, int64_t features, const char* name) {
  if (!t.has_value()) return {features, nullptr, true};
  const Columns c{t->numel(), indices(*t, name), false};
  for (int64_t i = 0; i < c.count; ++i) {
    const int64_t lowest = i == 0 ? 0 : c.kept[i - 1] + 1;
    STD_TORCH_CHECK(c.kept[i] >= lowest && c.kept[i] < features, name, ": wanted ascending columns in [0, ", features,
                    "); got ", c.kept[i], " at position ", i);
  }
  return c;
}

Matrix matrix(const Tensor& panels, int64_t first, int64_t n, int64_t k, const char* name) {
  const int64_t size = gohsp::kernels().packed_size(n, k);
  STD_TORCH_CHECK(first + size <= panels.numel(), name, ": wanted packed weights of ", n, " outputs and ", k,
                  " inputs; got ", panels.numel(), " floats");
  return {floats(panels, name) + first, n, k};
}

void run_in_torch_pool(int64_t workers, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

gohsp::Parallel pool() { return {static_cast<int64_t>(torch::stable::get_num_threads()), run_in_torch_pool}; }

gohsp::Activation activation_of(int64_t id) {
  STD_TORCH_CHECK(id >= 0 && id < gohsp::kActivations, "activation: wanted 0 to ", gohsp::kActivations - 1, "; got ", id);
  return static_cast<gohsp::Activation>(id);
}

struct Widths {
  gohsp::Heads heads;
  int64_t qk_total = 0, v_total = 0;
};

Widths widths_of(const Tensor& widths, const std::optional<Tensor>& qk_norm, double scale, double qk_eps) {
  STD_TORCH_CHECK(widths.dim() == 2 && widths.size(0) == 2, "widths: wanted shape [2, heads]");
  const int64_t count = widths.size(1);
  const int64_t* w = indices(widths, "widths");
  const float* norm = qk_norm.has_value() ? floats(*qk_norm, "qk_norm") : nullptr;
  Widths result{{count, w, w + count, norm, static_cast<float>(qk_eps), static_cast<float>(scale)}};
  for (int64_t h = 0; h < count; ++h) {
    STD_TORCH_CHECK(w[h] >= 0 && w[count + h] >= 0, "widths: wanted no negative width");
    STD_TORCH_CHECK(norm == nullptr || qk_norm->numel() == 4 * w[h], "qk_norm: wanted shape [4, ", w[h], "]");
    result.qk_total += w[h];
    result.v_total += w[count + h];
  }
  return result;
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()});
}

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor cpu_pack(Tensor weight, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: wanted 2 dimensions; got ", weight.dim());
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == n, "bias: wanted ", n, " elements");
  Tensor panels = new_tensor(weight, {gohsp::kernels().packed_size(n, k)});
  gohsp::kernels().pack(floats(weight, "weight"), bias.has_value() ? floats(*bias, "bias") : nullptr, n, k, data(panels));
  return panels;
}

Tensor cpu_linear(Tensor x, Tensor panels, std::optional<Tensor> in_cols, std::optional<Tensor> out_cols,
                  int64_t kept_outputs, int64_t out_features, int64_t activation) {
  x = torch::stable::contiguous(x);
  const int64_t features = x.size(x.dim() - 1);
  const Columns in = columns(in_cols, features, "in_cols"), out = columns(out_cols, out_features, "out_cols");
  STD_TORCH_CHECK(out.count == kept_outputs, "out_cols: wanted ", kept_outputs, " columns; got ", out.count);
  std::vector<int64_t> shape = shape_of(x);
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  shape.back() = out_features;
  Tensor y = new_tensor(x, shape);
  gohsp::kernels().linear(matrix(panels, 0, kept_outputs, in.count, "panels"), in, out, activation_of(activation),
                          floats(x, "x"), rows, features, data(y), out_features, pool());
  return y;
}

Tensor cpu_attention(Tensor qkv, Tensor widths, std::optional<Tensor> qk_norm, double scale, double eps,
                     int64_t v_total, int64_t num_queries) {
  qkv = torch::stable::contiguous(qkv);
  const Widths w = widths_of(widths, qk_norm, scale, eps);
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) == 2 * w.qk_total + w.v_total && v_total == w.v_total,
                  "qkv: wanted [batch, tokens, ", 2 * w.qk_total + w.v_total, "]");
  const gohsp::Shape shape{qkv.size(0), qkv.size(1), qkv.size(2), num_queries};
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= shape.tokens, "num_queries: wanted 0 to ", shape.tokens);
  Tensor y = new_tensor(qkv, {shape.batch, num_queries, w.v_total});
  gohsp::kernels().attention(w.heads, floats(qkv, "qkv"), shape, data(y), pool());
  return y;
}

Tensor cpu_attention_sublayer(Tensor x, Tensor qkv_panels, Tensor proj_panels, std::optional<Tensor> in_cols,
                              std::optional<Tensor> out_cols, Tensor widths, std::optional<Tensor> qk_norm,
                              double scale, double eps, double qk_eps, int64_t num_queries) {
  x = torch::stable::contiguous(x);
  STD_TORCH_CHECK(x.dim() == 3, "x: wanted 3 dimensions; got ", x.dim());
  const gohsp::Shape shape{x.size(0), x.size(1), x.size(2), num_queries};
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= shape.tokens, "num_queries: wanted 0 to ", shape.tokens);
  const Widths w = widths_of(widths, qk_norm, scale, qk_eps);
  gohsp::Attention a{};
  a.in = columns(in_cols, shape.features, "in_cols");
  a.out = columns(out_cols, shape.features, "out_cols");
  const int64_t qk_size = gohsp::kernels().packed_size(w.qk_total, a.in.count);
  a.q = matrix(qkv_panels, 0, w.qk_total, a.in.count, "qkv_panels");
  a.k = matrix(qkv_panels, qk_size, w.qk_total, a.in.count, "qkv_panels");
  a.v = matrix(qkv_panels, 2 * qk_size, w.v_total, a.in.count, "qkv_panels");
  a.proj = matrix(proj_panels, 0, a.out.count, w.v_total, "proj_panels");
  a.heads = w.heads;
  a.eps = static_cast<float>(eps);
  Tensor y = new_tensor(x, {shape.batch, num_queries, shape.features});
  const gohsp::Sublayer layer{&a, nullptr};
  gohsp::kernels().sublayers(&layer, 1, floats(x, "x"), data(y), shape, pool());
  return y;
}

Tensor cpu_mlp_sublayer(Tensor x, Tensor fc1_panels, Tensor fc2_panels, std::optional<Tensor> in_cols,
                        std::optional<Tensor> out_cols, int64_t hidden, int64_t activation, double eps) {
  x = torch::stable::contiguous(x);
  const int64_t features = x.size(x.dim() - 1);
  const int64_t rows = features == 0 ? 0 : x.numel() / features;
  gohsp::Mlp m{};
  m.in = columns(in_cols, features, "in_cols");
  m.out = columns(out_cols, features, "out_cols");
  m.fc1 = matrix(fc1_panels, 0, hidden, m.in.count, "fc1_panels");
  m.fc2 = matrix(fc2_panels, 0, m.out.count, hidden, "fc2_panels");
  m.activation = activation_of(activation);
  m.eps = static_cast<float>(eps);
  Tensor y = new_tensor(x, shape_of(x));
  const gohsp::Sublayer layer{nullptr, &m};
  // Rows are independent here, so the whole batch is one image of many tokens.
  gohsp::kernels().sublayers(&layer, 1, floats(x, "x"), data(y), {1, rows, features, rows}, pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gohsp_kernels, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&cpu_pack));
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_attention_sublayer", TORCH_BOX(&cpu_attention_sublayer));
  m.impl("cpu_mlp_sublayer", TORCH_BOX(&cpu_mlp_sublayer));
}

extern "C" __attribute__((visibility("default"))) const char* gohsp_cpu_capability() { return gohsp::kernels().name; }
