// SPDX-License-Identifier: Apache-2.0
// Checks of arguments and registration of the native CPU operators, on the LibTorch stable ABI: one binary serves
// torch 2.10 and newer. The schemas are in gohsp_kernels/_schemas.py; gohsp_kernels/cpu.py writes what is read here.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>

#include "../cpu/kernels.h"
#include "../cpu/throttle.h"
#include "reading.h"

namespace {

using gohsp::check_matrix;
using gohsp::checked_features;
using gohsp::Columns;
using gohsp::Format;
using gohsp::kMostColumns;
using gohsp::Matrix;
using gohsp::new_tensor;
using gohsp::Reader;
using gohsp::ScalarType;
using gohsp::Tensor;

template <class T>
const T* contents(const Tensor& t, ScalarType dtype, const char* name, const char* wanted) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": wanted ", wanted, "; got another dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": wanted a contiguous tensor");
  return static_cast<const T*>(t.const_data_ptr());
}

const float* floats(const Tensor& t, const char* name) {
  return contents<float>(t, ScalarType::Float, name, "float32");
}

const int64_t* indices(const Tensor& t, const char* name) {
  return contents<int64_t>(t, ScalarType::Long, name, "int64");
}

constexpr int64_t kMostPixels = 1 << 20;  // of a side

float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void run_in_torch_pool(int64_t workers, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

// Torch's threads, as many as are present.
gohsp::Parallel pool() {
  return {gohsp::worker_throttle().next_size(static_cast<int64_t>(torch::stable::get_num_threads())),
          run_in_torch_pool};
}

// --- packing ---------------------------------------------------------------------------------------------------------

// What the weights of a format come as.
struct FormatOf {
  const char* name;
  ScalarType dtype;
  bool scales;
};

#define GOHSP_FORMAT(name, type, dtype, scales) {#name, ScalarType::dtype, scales},
constexpr FormatOf kFormatOf[] = {GOHSP_FORMATS(GOHSP_FORMAT)};
#undef GOHSP_FORMAT

Tensor cpu_pack(Tensor weight, std::optional<Tensor> scales, std::optional<Tensor> bias, int64_t format_number) {
  STD_TORCH_CHECK(format_number >= 0 && format_number < gohsp::kFormats, "format: wanted 0 to ", gohsp::kFormats - 1);
  const Format format = static_cast<Format>(format_number);
  const FormatOf& wanted = kFormatOf[format_number];
  STD_TORCH_CHECK(weight.dim() == 2, "weight: wanted 2 dimensions; got ", weight.dim());
  const int64_t n = weight.size(0), k = weight.size(1);
  check_matrix(n, k, "weight");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == n, "bias: wanted ", n, " elements");
  STD_TORCH_CHECK(scales.has_value() == wanted.scales && (!scales.has_value() || scales->numel() == n),
                  "scales: wanted ", wanted.scales ? n : 0, " elements for ", wanted.name);
  STD_TORCH_CHECK(format != Format::int8 || k <= gohsp::kMostInt8Inputs, "weight: wanted at most ",
                  gohsp::kMostInt8Inputs, " inputs; got ", k);
  const gohsp::Unpacked from{contents<void>(weight, wanted.dtype, "weight", wanted.name),
                             scales.has_value() ? floats(*scales, "scales") : nullptr,
                             bias.has_value() ? floats(*bias, "bias") : nullptr, n, k};
  const std::vector<int64_t> words{gohsp::kernels().packed_bytes(format, n, k) / static_cast<int64_t>(sizeof(int32_t))};
  Tensor panels = torch::stable::new_empty(weight, {words.data(), words.size()}, ScalarType::Int);
  gohsp::kernels().pack(format, from, panels.mutable_data_ptr());
  return panels;
}

// The columns of a gather or scatter as a layout holds them: their number and their plan. Kernels trust a plan, so the
// order and range of the columns are checked here.
Tensor cpu_plan(Tensor columns, int64_t features, bool scatter) {
  const int64_t* kept = indices(columns, "columns");
  checked_features(features, "features");
  const int64_t count = columns.numel();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t lowest = i == 0 ? 0 : kept[i - 1] + 1;
    STD_TORCH_CHECK(kept[i] >= lowest && kept[i] < features, "columns: wanted ascending ones in [0, ", features,
                    "); got ", kept[i], " at position ", i);
  }
  const int64_t words = gohsp::kernels().plan_bytes(features) / static_cast<int64_t>(sizeof(int64_t));
  Tensor plan = new_tensor(columns, {1 + words});
  int64_t* to = static_cast<int64_t*>(plan.mutable_data_ptr());
  *to = count;
  gohsp::kernels().plan(kept, count, features, scatter ? gohsp::Direction::scatter : gohsp::Direction::gather, to + 1);
  return plan;
}

// The format whose packing number this is. Panels go with pickled and exported models to machines whose kernels arrange
// weights in another way. They would read them without complaint where the sizes happen to agree.
Format format_of(int64_t packing) {
  const auto packed_by = [packing](const char* name) {
    int64_t format = 0;
    while (format < gohsp::kFormats && packing != gohsp::packing_of(name, static_cast<Format>(format))) ++format;
    return format;
  };
  const char* here = gohsp::kernels().name;
  const int64_t format = packed_by(here);
  if (format < gohsp::kFormats) return static_cast<Format>(format);
  const char* there = "another version of gohsp";
  for (const char* const* name = gohsp::instruction_sets(); *name != nullptr; ++name)
    if (packed_by(*name) < gohsp::kFormats) there = *name;
  STD_TORCH_CHECK(false, "panels: wanted weights that were packed for ", here,
                  ", the instruction set of this process; got some that were packed for ", there,
                  ". Save the compressed model instead, and freeze it here");
}

// --- what is packed, read in the order in which gohsp_kernels/cpu.py wrote it ------------------------------------------

struct Totals {
  int64_t qk = 0, v = 0;
};

Totals totals_of(const gohsp::Heads& heads) {
  Totals totals;
  for (int64_t h = 0; h < heads.count; ++h) {
    for (const int64_t width : {heads.qk_widths[h], heads.v_widths[h]})
      STD_TORCH_CHECK(width >= 0 && width < kMostColumns, "widths: wanted 0 to ", kMostColumns - 1, "; got ", width);
    totals.qk += heads.qk_widths[h];
    totals.v += heads.v_widths[h];
    checked_features(totals.qk, "widths");
    checked_features(totals.v, "widths");
  }
  return totals;
}

// Channels of the q and k norms, which all heads share.
int64_t norm_width(const gohsp::Heads& heads) {
  const int64_t width = heads.count > 0 ? heads.qk_widths[0] : 0;
  for (int64_t h = 0; h < heads.count; ++h)
    STD_TORCH_CHECK(heads.qk_widths[h] == width, "qk_norm: wanted heads of one QK width; got ", width, " and ",
                    heads.qk_widths[h]);
  return width;
}

// A layout, and the packed matrices that it describes, which stand one behind the other.
class Packed {
 public:
  Packed(const Tensor& panels, const Tensor& layout)
      : numbers_(indices(layout, "layouts"), layout.numel(), "layouts"),
        words_(contents<int32_t>(panels, ScalarType::Int, "panels", "int32"), panels.numel(), "panels"),
        format_(format_of(numbers_.number())) {}

  Format format() const { return format_; }
  int64_t number() { return numbers_.number(); }
  const int64_t* numbers(int64_t count) { return numbers_.take(count); }

  // A count and a plan, or -1 for all columns.
  Columns columns(int64_t features) {
    const int64_t count = number();
    if (count < 0) return {features, nullptr};
    const int64_t words = gohsp::kernels().plan_bytes(features) / static_cast<int64_t>(sizeof(int64_t));
    const Columns columns{count, numbers(words)};
    STD_TORCH_CHECK(gohsp::kernels().plan_fits(columns, features), "layouts: columns do not fit ", features,
                    " features");
    return columns;
  }

  Matrix matrix(int64_t n, int64_t k) {
    check_matrix(n, k, "layouts");
    const int64_t bytes = gohsp::kernels().packed_bytes(format_, n, k);
    return {words_.take(bytes / static_cast<int64_t>(sizeof(int32_t))), n, k, format_};
  }

  const float* floats(int64_t count) { return reinterpret_cast<const float*>(words_.take(count)); }

  bool empty() const { return numbers_.empty() && words_.empty(); }

 private:
  Reader<int64_t> numbers_;
  Reader<int32_t> words_;
  Format format_;
};

gohsp::Norm norm_of(int64_t id) {
  STD_TORCH_CHECK(id == 0 || id == 1, "layouts: unknown kind of norm ", id);
  return static_cast<gohsp::Norm>(id);
}

// What a layout tells of attention itself, beside widths: whether q and k are normalised, how, by how many pairs of how
// many tokens they are turned, how many groups of how many tokens have biases of their own, whether scores are cosines.
struct HeadNumbers {
  bool normalised;
  gohsp::Norm norm;
  int64_t tokens, pairs;
  int64_t bias_groups, bias_tokens;
  bool cosine;
};
constexpr int64_t kHeadNumbers = 7;

HeadNumbers head_numbers(const int64_t* numbers) {
  return {numbers[0] != 0, norm_of(numbers[1]), numbers[2], numbers[3], numbers[4], numbers[5], numbers[6] != 0};
}

// The angles of heads, from the words that hold them.
template <class Words>
gohsp::Rope read_rope(const gohsp::Heads& heads, const HeadNumbers& turns, int64_t qk_total, Words&& floats) {
  STD_TORCH_CHECK(turns.tokens >= 0 && turns.tokens < kMostColumns,
                  "rope: wanted no negative number of tokens, and no gigantic one");
  for (int64_t h = 0; h < heads.count; ++h)
    STD_TORCH_CHECK(heads.qk_widths[h] % 2 == 0, "rope: wanted even QK widths; got ", heads.qk_widths[h]);
  if (2 * turns.pairs != qk_total)
    STD_TORCH_CHECK(2 * turns.pairs == norm_width(heads), "rope: wanted ", qk_total / 2,
                    " pairs, or those of one of equal heads; got ", turns.pairs);
  return {floats(2 * turns.tokens * turns.pairs), turns.tokens, turns.pairs};
}

// The biases of all groups, from the words that hold them.
template <class Words>
gohsp::ScoreBias read_bias(int64_t heads, const HeadNumbers& numbers, Words&& floats) {
  const int64_t groups = numbers.bias_groups, tokens = numbers.bias_tokens;
  STD_TORCH_CHECK(groups > 0 && groups < kMostColumns && tokens >= 0 && tokens < kMostColumns,
                  "biases: wanted a group, no negative number of tokens, and no gigantic ones");
  const int64_t stride = gohsp::ScoreBias::row_stride_of(tokens);
  int64_t count = groups;
  for (const int64_t size : {heads, tokens, stride})
    STD_TORCH_CHECK(!__builtin_mul_overflow(count, size, &count), "biases: wanted no gigantic one");
  return {floats(count), groups, tokens};
}

// Norms, angles, biases and factors of heads whose widths are there, from the words that hold them.
template <class Words>
void read_heads(gohsp::Heads& heads, const HeadNumbers& turns, int64_t qk_total, Words&& floats) {
  heads.norm = turns.norm;
  if (turns.normalised) heads.qk_norm = floats(4 * norm_width(heads));
  if (turns.pairs != 0) heads.rope = read_rope(heads, turns, qk_total, floats);
  if (turns.bias_groups != 0) heads.bias = read_bias(heads.count, turns, floats);
  if (turns.cosine) heads.cosine = floats(heads.count);
}

void check_images(const gohsp::Heads& heads, int64_t batch, int64_t tokens) {
  STD_TORCH_CHECK(heads.rope.angles == nullptr || heads.rope.tokens == tokens, "x: wanted ", heads.rope.tokens,
                  " tokens, for which rotary positions were packed; got ", tokens);
  if (heads.bias.values == nullptr) return;
  STD_TORCH_CHECK(heads.bias.tokens == tokens, "x: wanted ", heads.bias.tokens,
                  " tokens, for which biases of attention were packed; got ", tokens);
  STD_TORCH_CHECK(batch % heads.bias.groups == 0, "x: wanted a multiple of ", heads.bias.groups,
                  " images, which have biases of their own in turns; got ", batch);
}

int64_t inner_features(int64_t features, int64_t kept) {
  STD_TORCH_CHECK(features == 0 || (features >= kept && features < kMostColumns), "layouts: wanted an inner norm over ",
                  kept, " features or more; got ", features);
  return features;
}

// A norm behind a sublayer is over all features.
void check_behind(bool behind, const Columns& out) {
  STD_TORCH_CHECK(!behind || out.plan == nullptr, "layouts: wanted all columns out in front of a norm");
}

// Order of the numbers: heads, numbers of these, features of the inner norm, whether the norm is behind, columns in,
// columns out, QK widths, V widths.
gohsp::Attention read_attention(Packed& packed, const double* constants, int64_t features) {
  gohsp::Attention a{};
  const int64_t count = packed.number();
  const HeadNumbers numbers = head_numbers(packed.numbers(kHeadNumbers));
  a.norm = numbers.norm;
  const int64_t inner = packed.number();
  const bool behind = packed.number() != 0;
  a.in = packed.columns(features);
  a.out = packed.columns(features);
  check_behind(behind, a.out);
  a.heads = {count,
             packed.numbers(count),
             packed.numbers(count),
             nullptr,
             static_cast<float>(constants[1]),
             static_cast<float>(constants[2])};
  const Totals totals = totals_of(a.heads);
  a.q = packed.matrix(totals.qk, a.in.count);
  a.k = packed.matrix(totals.qk, a.in.count);
  a.v = packed.matrix(totals.v, a.in.count);
  a.proj = packed.matrix(a.out.count, totals.v);
  read_heads(a.heads, numbers, totals.qk, [&](int64_t n) { return packed.floats(n); });
  if (behind) a.behind = packed.floats(2 * features);
  a.inner = {inner_features(inner, totals.v), static_cast<float>(constants[3])};
  a.eps = static_cast<float>(constants[0]);
  return a;
}

// Order of the numbers: hidden neurons, activation, whether there is a gate, kind of norms, features of the inner norm,
// whether the norm is behind, columns in, columns out.
gohsp::Mlp read_mlp(Packed& packed, const double* constants, int64_t features) {
  gohsp::Mlp m{};
  const int64_t hidden = packed.number();
  m.activation = gohsp::activation_of(packed.number());
  const bool gated = packed.number() != 0;
  m.norm = norm_of(packed.number());
  m.inner = {inner_features(packed.number(), hidden), static_cast<float>(constants[3])};
  const bool behind = packed.number() != 0;
  m.in = packed.columns(features);
  m.out = packed.columns(features);
  check_behind(behind, m.out);
  m.fc1 = packed.matrix(hidden, m.in.count);
  m.fc2 = packed.matrix(m.out.count, hidden);
  if (gated) m.gate = packed.matrix(hidden, m.in.count);
  if (behind) m.behind = packed.floats(2 * features);
  m.eps = static_cast<float>(constants[0]);
  return m;
}

// --- operators -------------------------------------------------------------------------------------------------------

// Order of the layout's numbers: outputs.
Tensor cpu_embed(Tensor images, Tensor panels, Tensor layout, Tensor base, std::vector<int64_t> patch) {
  images = torch::stable::contiguous(images);
  STD_TORCH_CHECK(images.dim() == 4, "images: wanted 4 dimensions; got ", images.dim());
  STD_TORCH_CHECK(base.dim() == 2, "base: wanted 2 dimensions; got ", base.dim());
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0, "patch: wanted a height and a width");
  for (int64_t i = 1; i < 4; ++i)
    STD_TORCH_CHECK(images.size(i) <= kMostPixels, "images: wanted at most ", kMostPixels, " pixels a side");
  const gohsp::Patches patches{images.size(1), images.size(2), images.size(3), patch[0], patch[1]};
  const int64_t tokens = base.size(0);
  STD_TORCH_CHECK(patches.height % patch[0] == 0 && patches.width % patch[1] == 0 && patches.count() <= tokens,
                  "images: wanted whole patches, at most ", tokens);
  Packed packed(panels, layout);
  const Matrix weight = packed.matrix(base.size(1), patches.size());
  STD_TORCH_CHECK(packed.empty(), "panels: wanted the weights of ", weight.n, " outputs and ", weight.k, " inputs");
  Tensor y = new_tensor(images, {images.size(0), tokens, weight.n});
  gohsp::kernels().embed(weight, patches, floats(images, "images"), images.size(0), floats(base, "base"), tokens,
                         data(y), pool());
  return y;
}

// Order of the layout's numbers: kept outputs, activation, columns in, columns out.
Tensor cpu_linear(Tensor x, Tensor panels, Tensor layout, int64_t out_features) {
  x = torch::stable::contiguous(x);
  STD_TORCH_CHECK(x.dim() > 0, "x: wanted at least 1 dimension");
  const int64_t features = checked_features(x.size(x.dim() - 1), "x");
  checked_features(out_features, "out_features");
  Packed packed(panels, layout);
  STD_TORCH_CHECK(packed.format() == Format::float32, "panels: wanted weights in float32");
  const int64_t kept = packed.number();
  const gohsp::Activation activation = gohsp::activation_of(packed.number());
  const Columns in = packed.columns(features), out = packed.columns(out_features);
  STD_TORCH_CHECK(out.count == kept, "out_cols: wanted ", kept, " columns; got ", out.count);
  const Matrix weight = packed.matrix(kept, in.count);
  STD_TORCH_CHECK(packed.empty(), "x: wanted the number of features that the weights were packed for; got ", features);
  std::vector<int64_t> shape = gohsp::shape_of(x);
  shape.back() = out_features;
  Tensor y = new_tensor(x, shape);
  gohsp::kernels().linear(weight, in, out, activation, floats(x, "x"), gohsp::rows_of(x), features, data(y),
                          out_features, pool());
  return y;
}

Tensor cpu_attention(Tensor qkv, Tensor widths, Tensor words, std::vector<int64_t> numbers, double scale, double eps,
                     int64_t v_total, int64_t num_queries) {
  qkv = torch::stable::contiguous(qkv);
  STD_TORCH_CHECK(widths.dim() == 2 && widths.size(0) == 2, "widths: wanted shape [2, heads]");
  const int64_t count = widths.size(1);
  const int64_t* w = indices(widths, "widths");
  gohsp::Heads heads{count, w, w + count, nullptr, static_cast<float>(eps), static_cast<float>(scale)};
  const Totals totals = totals_of(heads);
  STD_TORCH_CHECK(numbers.size() == kHeadNumbers, "numbers: wanted ", kHeadNumbers, "; got ", numbers.size());
  Reader<int32_t> reader(contents<int32_t>(words, ScalarType::Int, "words", "int32"), words.numel(), "words");
  read_heads(heads, head_numbers(numbers.data()), totals.qk,
             [&](int64_t n) { return reinterpret_cast<const float*>(reader.take(n)); });
  STD_TORCH_CHECK(reader.empty(), "words: wanted no more than norms, angles, biases and factors");
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) == 2 * totals.qk + totals.v && v_total == totals.v,
                  "qkv: wanted [batch, tokens, ", 2 * totals.qk + totals.v, "]");
  const gohsp::Shape shape{qkv.size(0), qkv.size(1), qkv.size(2), num_queries};
  check_images(heads, shape.batch, shape.tokens);
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= shape.tokens, "num_queries: wanted 0 to ", shape.tokens);
  Tensor y = new_tensor(qkv, {shape.batch, num_queries, totals.v});
  gohsp::kernels().attention(heads, floats(qkv, "qkv"), shape, data(y), pool());
  return y;
}

Tensor cpu_sublayers(Tensor x, std::vector<Tensor> panels, std::vector<Tensor> layouts, std::vector<double> constants,
                     int64_t num_queries) {
  x = torch::stable::contiguous(x);
  STD_TORCH_CHECK(x.dim() == 3, "x: wanted 3 dimensions; got ", x.dim());
  const gohsp::Shape shape{x.size(0), x.size(1), checked_features(x.size(2), "x"), num_queries};
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= shape.tokens, "num_queries: wanted 0 to ", shape.tokens);
  const size_t count = panels.size();
  STD_TORCH_CHECK(count > 0 && layouts.size() == count && constants.size() == gohsp::kCpuConstants * count,
                  "panels, layouts, constants: wanted the same number of sublayers, at least one");
  gohsp::Chain<gohsp::Attention, gohsp::Mlp, gohsp::Sublayer> chain(count);
  for (size_t i = 0; i < count; ++i) {
    Packed packed(panels[i], layouts[i]);
    const double* own = constants.data() + gohsp::kCpuConstants * i;
    const gohsp::SublayerKind kind = gohsp::kind_of(packed.number());
    STD_TORCH_CHECK(packed.number() == shape.features, "x: wanted the number of features that sublayer ", i,
                    " was packed for; got ", shape.features);
    if (kind == gohsp::SublayerKind::attention) {
      const gohsp::Attention attention = read_attention(packed, own, shape.features);
      check_images(attention.heads, shape.batch, shape.tokens);
      chain.add(attention);
    } else {
      chain.add(read_mlp(packed, own, shape.features));
    }
    STD_TORCH_CHECK(packed.empty(), "layouts: do not fit the packed weights of sublayer ", i);
  }
  Tensor y = new_tensor(x, {shape.batch, num_queries, shape.features});
  gohsp::kernels().sublayers(chain.layers(), chain.size(), floats(x, "x"), data(y), shape, pool());
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
  m.impl("cpu_plan", TORCH_BOX(&cpu_plan));
  m.impl("cpu_embed", TORCH_BOX(&cpu_embed));
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_sublayers", TORCH_BOX(&cpu_sublayers));
}

// Called by ctypes, which no exception may cross.
#define GOHSP_EXPORT extern "C" __attribute__((visibility("default")))

// Why no kernels can run here, or the empty string.
GOHSP_EXPORT const char* gohsp_cpu_missing() noexcept {
  static thread_local std::string reason;
  try {
    gohsp::kernels();
    reason.clear();
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return reason.c_str();
}

// These are for where none is missing.
GOHSP_EXPORT const char* gohsp_cpu_capability() noexcept { return gohsp::kernels().name; }
GOHSP_EXPORT int64_t gohsp_cpu_activation_levels() noexcept { return gohsp::kernels().activation_levels; }
GOHSP_EXPORT int64_t gohsp_cpu_packing(int64_t format) noexcept {
  return gohsp::packing_of(gohsp::kernels().name, static_cast<Format>(format));
}

GOHSP_EXPORT bool gohsp_cpu_attends_in_pairs(int64_t format) noexcept {
  return gohsp::kernels().attends_in_pairs(static_cast<Format>(format));
}
GOHSP_EXPORT double gohsp_cpu_bfloat16_gain() noexcept { return gohsp::bfloat16_gain_in_vectors(); }

// The names of one list of csrc/common/wire.h, each behind a space, in the order of their numbers; nullptr for no list.
GOHSP_EXPORT const char* gohsp_names(const char* list) noexcept {
#define GOHSP_NAME(name, ...) " " #name
  if (std::strcmp(list, "activations") == 0) return GOHSP_ACTIVATIONS(GOHSP_NAME);
  if (std::strcmp(list, "formats") == 0) return GOHSP_FORMATS(GOHSP_NAME);
  if (std::strcmp(list, "sublayers") == 0) return GOHSP_SUBLAYERS(GOHSP_NAME);
  if (std::strcmp(list, "cuda_inputs") == 0) return GOHSP_CUDA_INPUTS(GOHSP_NAME);
  if (std::strcmp(list, "cuda_vectors") == 0) return GOHSP_CUDA_VECTORS(GOHSP_NAME);
  return nullptr;
}

// False where the sum could not be computed.
GOHSP_EXPORT bool gohsp_cpu_checksum(const int64_t* spans, int64_t count, uint64_t* sum) noexcept {
  try {
    *sum = checksum_of(spans, count);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}
