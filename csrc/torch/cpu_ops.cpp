// SPDX-License-Identifier: Apache-2.0
// Checks of arguments and registration of the native CPU operators, on the LibTorch stable ABI: one binary serves
// torch 2.10 and newer. The schemas are in gohsp_kernels/_schemas.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../cpu/crew.h"
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
Columns checked(const Columns& c, int64_t features, const char* name) {
  for (int64_t i = 0; i < c.count; ++i) {
    const int64_t lowest = i == 0 ? 0 : c.kept[i - 1] + 1;
    STD_TORCH_CHECK(c.kept[i] >= lowest && c.kept[i] < features, name, ": wanted ascending columns in [0, ", features,
                    "); got ", c.kept[i], " at position ", i);
  }
  return c;
}

Columns columns(const std::optional<Tensor>& t, int64_t features, const char* name) {
  if (!t.has_value()) return {features, nullptr, true};
  return checked({t->numel(), indices(*t, name), false}, features, name);
}

void run_in_torch_pool(int64_t workers, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

// Torch's threads, as many as are present.
gohsp::Parallel pool() {
  return {gohsp::crew().next_size(static_cast<int64_t>(torch::stable::get_num_threads())), run_in_torch_pool};
}

gohsp::Activation activation_of(int64_t id) {
  STD_TORCH_CHECK(id >= 0 && id < gohsp::kActivations, "activation: wanted 0 to ", gohsp::kActivations - 1, "; got ",
                  id);
  return static_cast<gohsp::Activation>(id);
}

struct Totals {
  int64_t qk = 0, v = 0;
};

Totals totals_of(const gohsp::Heads& heads) {
  Totals totals;
  for (int64_t h = 0; h < heads.count; ++h) {
    STD_TORCH_CHECK(heads.qk_widths[h] >= 0 && heads.v_widths[h] >= 0, "widths: wanted no negative width");
    totals.qk += heads.qk_widths[h];
    totals.v += heads.v_widths[h];
  }
  return totals;
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
  gohsp::kernels().pack(floats(weight, "weight"), bias.has_value() ? floats(*bias, "bias") : nullptr, n, k,
                        data(panels));
  return panels;
}

Tensor cpu_pack_int8(Tensor weight, Tensor scales, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: wanted 2 dimensions; got ", weight.dim());
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "weight: wanted int8; got another dtype");
  STD_TORCH_CHECK(weight.is_contiguous(), "weight: wanted a contiguous tensor");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(k <= gohsp::kMostInt8Inputs, "weight: wanted at most ", gohsp::kMostInt8Inputs, " inputs; got ", k);
  STD_TORCH_CHECK(scales.numel() == n, "scales: wanted ", n, " elements");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == n, "bias: wanted ", n, " elements");
  Tensor panels = new_tensor(weight, {gohsp::kernels().packed_size_int8(n, k)});
  gohsp::kernels().pack_int8(static_cast<const int8_t*>(weight.const_data_ptr()), floats(scales, "scales"),
                             bias.has_value() ? floats(*bias, "bias") : nullptr, n, k, panels.mutable_data_ptr());
  return panels;
}

Tensor cpu_pack_bf16(Tensor weight, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: wanted 2 dimensions; got ", weight.dim());
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16, "weight: wanted bfloat16; got another dtype");
  STD_TORCH_CHECK(weight.is_contiguous(), "weight: wanted a contiguous tensor");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == n, "bias: wanted ", n, " elements");
  Tensor panels = new_tensor(weight, {gohsp::kernels().packed_size_bf16(n, k) / 2});
  gohsp::kernels().pack_bf16(static_cast<const uint16_t*>(weight.const_data_ptr()),
                             bias.has_value() ? floats(*bias, "bias") : nullptr, n, k, panels.mutable_data_ptr());
  return panels;
}

// Panels go with pickled and exported models to machines whose kernels arrange weights in another way. They would read
// them without complaint where the sizes happen to agree.
void check_packing(int64_t packing) {
  const char* here = gohsp::kernels().name;
  if (packing == gohsp::packing_of(here)) return;
  const char* there = "another version of gohsp";
  for (const char* name : {"scalar", "avx2", "avx512", "avx512vnni", "amx", "neon"})
    if (packing == gohsp::packing_of(name)) there = name;
  STD_TORCH_CHECK(false, "panels: wanted weights that were packed for ", here,
                  ", the instruction set of this process; ", "got some that were packed for ", there,
                  ". Save the compressed model instead, and freeze it here");
}

Tensor cpu_embed(Tensor images, Tensor panels, int64_t packing, Tensor base, std::vector<int64_t> patch) {
  check_packing(packing);
  images = torch::stable::contiguous(images);
  STD_TORCH_CHECK(images.dim() == 4, "images: wanted 4 dimensions; got ", images.dim());
  STD_TORCH_CHECK(base.dim() == 2, "base: wanted 2 dimensions; got ", base.dim());
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0, "patch: wanted a height and a width");
  const gohsp::Patches patches{images.size(1), images.size(2), images.size(3), patch[0], patch[1]};
  const int64_t tokens = base.size(0);
  const Matrix weight{floats(panels, "panels"), base.size(1), patches.size()};
  STD_TORCH_CHECK(patches.height % patch[0] == 0 && patches.width % patch[1] == 0 && patches.count() <= tokens,
                  "images: wanted whole patches, at most ", tokens);
  STD_TORCH_CHECK(gohsp::kernels().packed_size(weight.n, weight.k) == panels.numel(), "panels: wanted the weights of ",
                  weight.n, " outputs and ", weight.k, " inputs");
  Tensor y = new_tensor(images, {images.size(0), tokens, weight.n});
  gohsp::kernels().embed(weight, patches, floats(images, "images"), images.size(0), floats(base, "base"), tokens,
                         data(y), pool());
  return y;
}

Tensor cpu_linear(Tensor x, Tensor panels, int64_t packing, std::optional<Tensor> in_cols,
                  std::optional<Tensor> out_cols, int64_t kept_outputs, int64_t out_features, int64_t activation) {
  check_packing(packing);
  x = torch::stable::contiguous(x);
  const int64_t features = x.size(x.dim() - 1);
  const Columns in = columns(in_cols, features, "in_cols"), out = columns(out_cols, out_features, "out_cols");
  STD_TORCH_CHECK(out.count == kept_outputs, "out_cols: wanted ", kept_outputs, " columns; got ", out.count);
  const Matrix weight{floats(panels, "panels"), kept_outputs, in.count};
  STD_TORCH_CHECK(gohsp::kernels().packed_size(weight.n, weight.k) == panels.numel(), "panels: wanted the weights of ",
                  weight.n, " outputs and ", weight.k, " inputs");
  std::vector<int64_t> shape = shape_of(x);
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  shape.back() = out_features;
  Tensor y = new_tensor(x, shape);
  gohsp::kernels().linear(weight, in, out, activation_of(activation), floats(x, "x"), rows, features, data(y),
                          out_features, pool());
  return y;
}

Tensor cpu_attention(Tensor qkv, Tensor widths, std::optional<Tensor> qk_norm, double scale, double eps,
                     int64_t v_total, int64_t num_queries) {
  qkv = torch::stable::contiguous(qkv);
  STD_TORCH_CHECK(widths.dim() == 2 && widths.size(0) == 2, "widths: wanted shape [2, heads]");
  const int64_t count = widths.size(1);
  const int64_t* w = indices(widths, "widths");
  gohsp::Heads heads{count, w, w + count, nullptr, static_cast<float>(eps), static_cast<float>(scale)};
  if (qk_norm.has_value()) {
    heads.qk_norm = floats(*qk_norm, "qk_norm");
    for (int64_t h = 0; h < count; ++h)
      STD_TORCH_CHECK(qk_norm->numel() == 4 * w[h], "qk_norm: wanted shape [4, ", w[h], "]");
  }
  const Totals totals = totals_of(heads);
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) == 2 * totals.qk + totals.v && v_total == totals.v,
                  "qkv: wanted [batch, tokens, ", 2 * totals.qk + totals.v, "]");
  const gohsp::Shape shape{qkv.size(0), qkv.size(1), qkv.size(2), num_queries};
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= shape.tokens, "num_queries: wanted 0 to ", shape.tokens);
  Tensor y = new_tensor(qkv, {shape.batch, num_queries, totals.v});
  gohsp::kernels().attention(heads, floats(qkv, "qkv"), shape, data(y), pool());
  return y;
}

// Reads the layout of one packed sublayer, number by number, as gohsp_kernels/cpu.py wrote it.
class Layout {
 public:
  explicit Layout(const Tensor& t) : next_(indices(t, "layouts")), end_(next_ + t.numel()) {}

  int64_t number() { return *take(1); }

  const int64_t* take(int64_t count) {
    STD_TORCH_CHECK(count >= 0 && count <= end_ - next_, "layouts: too short");
    const int64_t* place = next_;
    next_ += count;
    return place;
  }

  bool empty() const { return next_ == end_; }

  // A count, or -1 for all columns, is followed by that many columns.
  Columns columns(int64_t features) {
    const int64_t count = number();
    return count < 0 ? Columns{features, nullptr, true} : checked({count, take(count), false}, features, "layouts");
  }

 private:
  const int64_t* next_;
  const int64_t* end_;
};

// The weights that panels of this dtype hold.
gohsp::Weights weights_of(const Tensor& panels) {
  switch (panels.scalar_type()) {
    case ScalarType::Float: return gohsp::Weights::fp32;
    case ScalarType::Char: return gohsp::Weights::int8;
    case ScalarType::BFloat16: return gohsp::Weights::bf16;
    default: STD_TORCH_CHECK(false, "panels: wanted float32, int8 or bfloat16; got another dtype");
  }
}

// Hands out the packed matrices of one sublayer, which stand one behind the other. Their dtype says what weights they
// hold; it is that of what cpu_pack, cpu_pack_int8 or cpu_pack_bf16 made.
class Panels {
 public:
  explicit Panels(const Tensor& t) : weights_(weights_of(t)) {
    STD_TORCH_CHECK(t.is_contiguous(), "panels: wanted a contiguous tensor");
    next_ = static_cast<const char*>(t.const_data_ptr());
    end_ = next_ + t.numel() * static_cast<int64_t>(t.element_size());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(next_) % alignof(float) == 0, "panels: wanted whole words of 4 bytes");
  }

  Matrix matrix(int64_t n, int64_t k) { return {take(packed_bytes(n, k)), n, k, weights_}; }

  const float* floats(int64_t count) { return static_cast<const float*>(take(count * sizeof(float))); }

  bool empty() const { return next_ == end_; }

 private:
  int64_t packed_bytes(int64_t n, int64_t k) const {
    if (weights_ == gohsp::Weights::int8) return gohsp::kernels().packed_size_int8(n, k);
    if (weights_ == gohsp::Weights::bf16) return gohsp::kernels().packed_size_bf16(n, k);
    return gohsp::kernels().packed_size(n, k) * static_cast<int64_t>(sizeof(float));
  }

  const void* take(int64_t size) {
    STD_TORCH_CHECK(size >= 0 && size <= end_ - next_, "panels: too short");
    const char* place = next_;
    next_ += size;
    return place;
  }

  gohsp::Weights weights_;
  const char* next_;
  const char* end_;
};

enum Kind : int64_t { kAttention, kMlp };

// Order of the numbers: heads, whether q and k are normalised, columns in, columns out, QK widths, V widths.
gohsp::Attention read_attention(Layout& layout, Panels& panels, const double* constants, int64_t features) {
  gohsp::Attention a{};
  const int64_t count = layout.number();
  const bool normalised = layout.number() != 0;
  a.in = layout.columns(features);
  a.out = layout.columns(features);
  a.heads = {count,
             layout.take(count),
             layout.take(count),
             nullptr,
             static_cast<float>(constants[1]),
             static_cast<float>(constants[2])};
  const Totals totals = totals_of(a.heads);
  a.q = panels.matrix(totals.qk, a.in.count);
  a.k = panels.matrix(totals.qk, a.in.count);
  a.v = panels.matrix(totals.v, a.in.count);
  a.proj = panels.matrix(a.out.count, totals.v);
  if (normalised) a.heads.qk_norm = panels.floats(count > 0 ? 4 * a.heads.qk_widths[0] : 0);
  a.eps = static_cast<float>(constants[0]);
  return a;
}

// Order of the numbers: hidden neurons, activation, columns in, columns out.
gohsp::Mlp read_mlp(Layout& layout, Panels& panels, const double* constants, int64_t features) {
  gohsp::Mlp m{};
  const int64_t hidden = layout.number();
  m.activation = activation_of(layout.number());
  m.in = layout.columns(features);
  m.out = layout.columns(features);
  m.fc1 = panels.matrix(hidden, m.in.count);
  m.fc2 = panels.matrix(m.out.count, hidden);
  m.eps = static_cast<float>(constants[0]);
  return m;
}

constexpr size_t kConstants = 3;  // of each sublayer: eps, eps of the q and k norms, softmax scale

Tensor cpu_sublayers(Tensor x, std::vector<Tensor> panels, std::vector<Tensor> layouts, std::vector<double> constants,
                     int64_t num_queries) {
  x = torch::stable::contiguous(x);
  STD_TORCH_CHECK(x.dim() == 3, "x: wanted 3 dimensions; got ", x.dim());
  const gohsp::Shape shape{x.size(0), x.size(1), x.size(2), num_queries};
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= shape.tokens, "num_queries: wanted 0 to ", shape.tokens);
  const size_t count = panels.size();
  STD_TORCH_CHECK(count > 0 && layouts.size() == count && constants.size() == kConstants * count,
                  "panels, layouts, constants: wanted the same number of sublayers, at least one");
  // Reserved, so that the sublayers' pointers into them stay true.
  std::vector<gohsp::Attention> attentions;
  std::vector<gohsp::Mlp> mlps;
  std::vector<gohsp::Sublayer> layers;
  attentions.reserve(count);
  mlps.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Layout layout(layouts[i]);
    Panels matrices(panels[i]);
    check_packing(layout.number());
    const int64_t kind = layout.number();
    STD_TORCH_CHECK(kind == kAttention || kind == kMlp, "layouts: unknown kind of sublayer ", kind);
    const double* own = constants.data() + kConstants * i;
    if (kind == kAttention) {
      attentions.push_back(read_attention(layout, matrices, own, shape.features));
      layers.push_back({&attentions.back(), nullptr});
    } else {
      mlps.push_back(read_mlp(layout, matrices, own, shape.features));
      layers.push_back({nullptr, &mlps.back()});
    }
    STD_TORCH_CHECK(layout.empty() && matrices.empty(), "x: wanted the number of features that sublayer ", i,
                    " was packed for; got ", shape.features);
  }
  Tensor y = new_tensor(x, {shape.batch, num_queries, shape.features});
  gohsp::kernels().sublayers(layers.data(), static_cast<int64_t>(count), floats(x, "x"), data(y), shape, pool());
  return y;
}

// One number for the bytes of all spans, each an address and a size, computed on torch's threads.
uint64_t checksum_of(const int64_t* spans, int64_t count) {
  constexpr int64_t kPiece = 1 << 18;  // a quarter of a mebibyte: some 10 us of reading
  struct Piece {
    const char* data;
    int64_t bytes;
    uint64_t sum;
  };
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t begin = 0; begin < spans[2 * i + 1]; begin += kPiece)
      pieces.push_back(
          {reinterpret_cast<const char*>(spans[2 * i]) + begin, std::min(kPiece, spans[2 * i + 1] - begin), 0});
  const auto checksum = gohsp::kernels().checksum;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < pieces.size(); i = next++) pieces[i].sum = checksum(pieces[i].data, pieces[i].bytes);
  };
  const int64_t workers = std::min(pool().workers, static_cast<int64_t>(pieces.size()));
  if (workers <= 1) {
    work();
  } else {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work();
    });
  }
  // Over the sums once more, so that their order counts: two tensors that change places are a change.
  std::vector<uint64_t> sums;
  for (const Piece& piece : pieces) sums.push_back(piece.sum);
  return checksum(sums.data(), static_cast<int64_t>(sums.size() * sizeof(uint64_t)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gohsp_kernels, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&cpu_pack));
  m.impl("cpu_pack_int8", TORCH_BOX(&cpu_pack_int8));
  m.impl("cpu_pack_bf16", TORCH_BOX(&cpu_pack_bf16));
  m.impl("cpu_embed", TORCH_BOX(&cpu_embed));
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_sublayers", TORCH_BOX(&cpu_sublayers));
}

#define GOHSP_EXPORT extern "C" __attribute__((visibility("default")))

GOHSP_EXPORT const char* gohsp_cpu_capability() { return gohsp::kernels().name; }
GOHSP_EXPORT int64_t gohsp_cpu_activation_levels() { return gohsp::kernels().activation_levels; }

// Called by ctypes, which no exception may cross. -1 where no kernels can run; packing itself then says why.
GOHSP_EXPORT int64_t gohsp_cpu_packing() noexcept {
  try {
    return gohsp::packing_of(gohsp::kernels().name);
  } catch (const std::exception&) {
    return -1;
  }
}

// Likewise; false where the sum could not be computed.
GOHSP_EXPORT bool gohsp_cpu_checksum(const int64_t* spans, int64_t count, uint64_t* sum) noexcept {
  try {
    *sum = checksum_of(spans, count);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}
