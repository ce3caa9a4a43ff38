// SPDX-License-Identifier: Apache-2.0
// Checks of arguments and registration of the native CUDA operators, on the LibTorch stable ABI. The schemas are in
// gohsp_kernels/_schemas.py; gohsp_kernels/cuda.py writes what is read here.
//
// Compiled with GOHSP_EMULATED the same file registers the emulated kernels, for tensors on the CPU: the module that
// the tests load.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../cuda/kernels.h"
#include "../cuda/probe.h"
#include "reading.h"

#ifdef GOHSP_EMULATED
#include "../cuda/emulate/block.h"
#else
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace {

using gohsp::new_tensor;
using gohsp::Reader;
using gohsp::ScalarType;
using gohsp::Tensor;
using gohsp::cuda::Precision;

#ifdef GOHSP_EMULATED

// The emulation lets kernels use the tensors of the running call, and no other memory.
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  ~OnDevice() { gohsp::cuda::emulate::forget(); }
  gohsp::cuda::Stream stream() const { return nullptr; }
};

void* pointer(const Tensor& t, size_t bytes) {
  void* data = t.data_ptr();
  gohsp::cuda::emulate::allow(data, bytes);
  return data;
}

#else

// Makes the device of a tensor the current one, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(index_of(t)), guard_(device_) {}

  gohsp::cuda::Stream stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "no current stream");
    return stream;
  }

 private:
  static int32_t index_of(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), "x: wanted a tensor on the GPU, where others are");
    return t.get_device();
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Where a tensor lies. The size is for the emulation.
void* pointer(const Tensor& t, size_t) { return t.data_ptr(); }

#endif

constexpr int64_t kMostTokens = int64_t{1} << 31;  // kernels count them in 32 bits

// Whether float32 may be multiplied as tf32 is torch's setting, which Python reads.
Precision precision_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Precision::f16;
    case ScalarType::BFloat16: return Precision::bf16;
    case ScalarType::Float: return tf32 ? Precision::tf32 : Precision::f32;
    default: STD_TORCH_CHECK(false, "x: wanted float16, bfloat16 or float32; got another dtype");
  }
}

// Contiguous, and beginning at a multiple of 16 bytes.
Tensor readable(const Tensor& x) {
  Tensor t = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % gohsp::cuda::kChunkBytes == 0 ? t : torch::stable::clone(t);
}

// From torch's allocator, which reuses it in the order of the stream: it may be dropped before the kernels have run.
Tensor new_bytes(const Tensor& like, size_t bytes) {
  const std::vector<int64_t> shape{static_cast<int64_t>(bytes)};
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, ScalarType::Byte);
}

// What lies on the device of x, for the kernels, and what lies on the host, to be read here.
void check_beside(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), name, ": wanted a tensor on the device of x");
}

template <class T>
Reader<T> parts_of(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name, ": wanted another dtype, or contiguous");
  return {static_cast<const T*>(pointer(t, t.numel() * sizeof(T))), t.numel(), name};
}

template <class T>
Reader<T> parts_beside(const Tensor& x, const Tensor& t, ScalarType dtype, const char* name) {
  check_beside(t, x, name);
  return parts_of<T>(t, dtype, name);
}

Reader<int64_t> host_numbers(const Tensor& layout) {
  STD_TORCH_CHECK(layout.is_cpu(), "layouts: wanted tensors on the cpu");
  return parts_of<int64_t>(layout, ScalarType::Long, "layouts");
}

// One packed sublayer or linear layer, read in the order in which gohsp_kernels/cuda.py wrote it.
class Packed {
 public:
  Packed(Precision precision, const Tensor& x, const Tensor& weights, const Tensor& vectors, const Tensor& tables,
         const Tensor& layout)
      : chunk_(gohsp::cuda::kChunkBytes / gohsp::cuda::element_bytes(precision)),
        weights_(static_cast<const char*>(pointer(weights, weights.numel() * gohsp::cuda::element_bytes(precision)))),
        chunks_(weights.numel() / chunk_),
        vectors_(parts_beside<float>(x, vectors, ScalarType::Float, "vectors")),
        tables_(parts_beside<int32_t>(x, tables, ScalarType::Int, "tables")),
        numbers_(host_numbers(layout)) {
    check_beside(weights, x, "weights");
    STD_TORCH_CHECK(weights.scalar_type() == x.scalar_type() && weights.is_contiguous(),
                    "weights: wanted the dtype of x, contiguous");
  }

  int64_t number() { return numbers_.number(); }
  // Each vector begins at a multiple of 16 bytes.
  const float* floats(int64_t count) { return vectors_.take((count + 3) / 4 * 4); }
  const int32_t* table(int64_t count) { return tables_.take(count); }

  // Numbers: outputs, chunks of depth, and which of the three vectors follow.
  gohsp::cuda::Matrix matrix() {
    using Vector = gohsp::cuda::MatrixVector;
    gohsp::cuda::Matrix m{};
    m.n = number();
    m.chunks = number();
    const int64_t parts = number();
    gohsp::check_matrix(m.n, m.chunks, "layouts");
    STD_TORCH_CHECK(m.n * m.chunks <= chunks_, "weights: too short");
    m.weight = weights_;
    weights_ += m.n * m.chunks * gohsp::cuda::kChunkBytes;
    chunks_ -= m.n * m.chunks;
    const auto has = [parts](Vector vector) { return (parts >> static_cast<int64_t>(vector) & 1) != 0; };
    if (has(Vector::bias)) m.bias = floats(m.n);
    if (has(Vector::row_sum)) m.row_sum = floats(m.n);
    if (has(Vector::scale)) m.scale = floats(m.n);
    return m;
  }

  // Elements of a row that a product with `m` reads.
  int64_t depth(const gohsp::cuda::Matrix& m) const { return m.chunks * chunk_; }

  // How the product with `m` reads its input. Numbers: form, columns, and whether there is a list.
  gohsp::cuda::Input input(const gohsp::cuda::Matrix& m, int64_t features) {
    using Form = gohsp::cuda::InputForm;
    gohsp::cuda::Input in{};
    in.form = static_cast<Form>(number());
    in.count = gohsp::checked_features(number(), "layouts");
    const bool listed = number() != 0;
    const bool copied = in.form == Form::copy, in_chunks = in.form == Form::chunks && listed;
    STD_TORCH_CHECK(copied || in_chunks || in.form == Form::direct, "layouts: unknown form of input");
    if (listed) in.list = table(in.form == Form::chunks ? m.chunks : in.count);
    // What lists lead to lies on the GPU, and was checked when it was packed.
    const bool fits =
        copied ? in.count <= depth(m) && (listed || in.count <= features) : in_chunks || depth(m) <= features;
    STD_TORCH_CHECK(fits, "layouts: wanted inputs among ", features, " features");
    return in;
  }

  // Where the product with `m` writes. Number: whether there is a list.
  gohsp::cuda::Output output(const gohsp::cuda::Matrix& m, int64_t features) {
    const bool listed = number() != 0;
    STD_TORCH_CHECK(listed ? m.n <= features : m.n == features, "layouts: wanted outputs for ", features,
                    " features; got ", m.n);
    return {listed ? table(features) : nullptr};
  }

  bool empty() const { return chunks_ == 0 && vectors_.empty() && tables_.empty() && numbers_.empty(); }

 private:
  int64_t chunk_;
  const char* weights_;
  int64_t chunks_;
  Reader<float> vectors_;
  Reader<int32_t> tables_;
  Reader<int64_t> numbers_;
};

void check_features(int64_t packed, int64_t features) {
  STD_TORCH_CHECK(packed == features, "x: wanted ", packed, " features, for which it was packed; got ", features);
}

// Numbers of the layout: features of x and of the result, activation, matrix, input, output.
Tensor cuda_linear(Tensor x, Tensor weights, Tensor vectors, Tensor tables, Tensor layout, int64_t out_features,
                   bool tf32) {
  const OnDevice device(x);
  STD_TORCH_CHECK(x.dim() > 0, "x: wanted at least 1 dimension");
  x = readable(x);
  const Precision precision = precision_of(x, tf32);
  Packed packed(precision, x, weights, vectors, tables, layout);
  const int64_t features = gohsp::checked_features(x.size(x.dim() - 1), "x");
  gohsp::checked_features(out_features, "out_features");
  check_features(packed.number(), features);
  STD_TORCH_CHECK(packed.number() == out_features, "out_features: wanted that for which it was packed");
  const gohsp::Activation activation = gohsp::activation_of(packed.number());
  const gohsp::cuda::Matrix weight = packed.matrix();
  const gohsp::cuda::Input in = packed.input(weight, features);
  const gohsp::cuda::Output out = packed.output(weight, out_features);
  STD_TORCH_CHECK(packed.empty(), "layout: does not fit the packed weights");

  std::vector<int64_t> shape = gohsp::shape_of(x);
  shape.back() = out_features;
  const int64_t rows = gohsp::rows_of(x);
  Tensor y = new_tensor(x, shape);
  if (y.numel() == 0) return y;
  const size_t bytes = gohsp::cuda::linear_workspace_bytes(precision, in, weight, rows);
  Tensor workspace = new_bytes(x, bytes);
  const size_t element = gohsp::cuda::element_bytes(precision);
  gohsp::cuda::run_linear(precision, weight, in, out, activation, pointer(x, x.numel() * element), rows, features,
                          pointer(y, y.numel() * element), out_features, workspace.data_ptr(), device.stream());
  return y;
}

// For qkv of any layout: its table of heads comes from Python, and was made from widths that are checked there.
Tensor cuda_attention(Tensor qkv, Tensor heads, std::optional<Tensor> qk_norm, int64_t widest, bool aligned,
                      double scale, double eps, int64_t v_total, int64_t num_queries, bool tf32) {
  const OnDevice device(qkv);
  qkv = readable(qkv);
  const Precision precision = precision_of(qkv, tf32);
  STD_TORCH_CHECK(qkv.dim() == 3, "qkv: wanted 3 dimensions; got ", qkv.dim());
  STD_TORCH_CHECK(
      heads.scalar_type() == ScalarType::Int && heads.is_contiguous() && heads.dim() == 2 && heads.size(1) == 6,
      "heads: wanted contiguous int32 of shape [heads, 6]");
  check_beside(heads, qkv, "heads");
  gohsp::checked_features(qkv.size(2), "qkv");
  gohsp::checked_features(v_total, "v_total");
  STD_TORCH_CHECK(qkv.size(1) < kMostTokens, "qkv: wanted at most ", kMostTokens - 1, " tokens; got ", qkv.size(1));
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= qkv.size(1), "num_queries: wanted 0 to ", qkv.size(1));
  gohsp::cuda::AttentionParams p{};
  p.images = qkv.size(0);
  p.tokens = static_cast<int32_t>(qkv.size(1));
  p.queries = static_cast<int32_t>(num_queries);
  p.qkv_stride = qkv.size(2);
  p.out_stride = v_total;
  p.head_count = static_cast<int32_t>(heads.size(0));
  p.scale = static_cast<float>(scale);
  p.eps = static_cast<float>(eps);
  p.aligned = aligned;
  Tensor y = new_tensor(qkv, {p.images, num_queries, v_total});
  if (y.numel() == 0) return y;
  const size_t element = gohsp::cuda::element_bytes(precision);
  if (qk_norm.has_value()) {
    STD_TORCH_CHECK(qk_norm->dim() == 2 && qk_norm->size(0) == 4, "qk_norm: wanted shape [4, QK width]");
    p.qk_norm = parts_beside<float>(qkv, *qk_norm, ScalarType::Float, "qk_norm").take(qk_norm->numel());
  }
  p.heads = static_cast<const int32_t*>(pointer(heads, heads.numel() * sizeof(int32_t)));
  p.qkv = pointer(qkv, qkv.numel() * element);
  p.out = pointer(y, y.numel() * element);
  gohsp::cuda::launch_attention(precision, widest, p, device.stream(), false);
  return y;
}

// Order of the numbers: heads, widest head, width of the q and k norms or 0, qkv, proj, input, output.
gohsp::cuda::Attention read_attention(Packed& packed, const double* constants, int64_t features) {
  gohsp::cuda::Attention a{};
  a.head_count = gohsp::checked_features(packed.number(), "layouts");
  a.widest = packed.number();
  const int64_t qk_norm = gohsp::checked_features(packed.number(), "layouts");
  a.qkv = packed.matrix();
  a.proj = packed.matrix();
  a.in = packed.input(a.qkv, features);
  a.out = packed.output(a.proj, features);
  a.heads = packed.table(6 * a.head_count);
  if (qk_norm > 0) a.qk_norm = packed.floats(4 * qk_norm);
  a.eps = static_cast<float>(constants[0]);
  a.qk_eps = static_cast<float>(constants[1]);
  a.scale = static_cast<float>(constants[2]);
  return a;
}

// Order of the numbers: activation, fc1, fc2, input, output.
gohsp::cuda::Mlp read_mlp(Packed& packed, const double* constants, int64_t features) {
  gohsp::cuda::Mlp m{};
  m.activation = gohsp::activation_of(packed.number());
  m.fc1 = packed.matrix();
  m.fc2 = packed.matrix();
  STD_TORCH_CHECK(packed.depth(m.fc2) == m.fc1.n, "layouts: wanted as many inputs of fc2 as outputs of fc1");
  m.in = packed.input(m.fc1, features);
  m.out = packed.output(m.fc2, features);
  m.eps = static_cast<float>(constants[0]);
  return m;
}

// All sublayers in one call. What is checked here is what C++ can see without waiting for the GPU; the contents of the
// tables were checked when they were packed.
Tensor cuda_sublayers(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> vectors, std::vector<Tensor> tables,
                      std::vector<Tensor> layouts, std::vector<double> constants, bool tf32, int64_t num_queries) {
  const OnDevice device(x);
  STD_TORCH_CHECK(x.dim() == 3, "x: wanted 3 dimensions; got ", x.dim());
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= x.size(1), "num_queries: wanted 0 to ", x.size(1));
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && vectors.size() == count && tables.size() == count && layouts.size() == count &&
                      constants.size() == gohsp::kConstants * count,
                  "weights, vectors, tables, layouts, constants: wanted the same number of sublayers, at least one");
  const Precision precision = precision_of(x, tf32);
  const int64_t features = gohsp::checked_features(x.size(2), "x");
  STD_TORCH_CHECK(x.size(1) < kMostTokens, "x: wanted at most ", kMostTokens - 1, " tokens; got ", x.size(1));
  gohsp::Chain<gohsp::cuda::Attention, gohsp::cuda::Mlp, gohsp::cuda::Sublayer> chain(count);
  for (size_t i = 0; i < count; ++i) {
    Packed packed(precision, x, weights[i], vectors[i], tables[i], layouts[i]);
    const gohsp::SublayerKind kind = gohsp::kind_of(packed.number());
    check_features(packed.number(), features);
    const double* own = constants.data() + gohsp::kConstants * i;
    if (kind == gohsp::SublayerKind::attention) {
      chain.add(read_attention(packed, own, features));
    } else {
      chain.add(read_mlp(packed, own, features));
    }
    STD_TORCH_CHECK(packed.empty(), "layouts: do not fit the packed weights of sublayer ", i);
  }
  // Without an attention no token needs another.
  if (!chain.has_attention()) x = torch::stable::narrow(x, 1, 0, num_queries);
  x = readable(x);
  const gohsp::cuda::Shape shape{x.size(0), x.size(1), features, num_queries};
  Tensor y = new_tensor(x, {shape.images, num_queries, features});
  if (y.numel() == 0) return y;
  const size_t bytes = gohsp::cuda::workspace_bytes(precision, chain.layers(), chain.size(), shape);
  const size_t element = gohsp::cuda::element_bytes(precision);
  Tensor workspace = new_bytes(x, bytes);
  gohsp::cuda::run_sublayers(precision, chain.layers(), chain.size(), pointer(x, x.numel() * element),
                             pointer(y, y.numel() * element), shape, workspace.data_ptr(), device.stream());
  return y;
}

// One checksum a row of `pieces` [count, 2], addresses and bytes of memory of the same device.
Tensor cuda_checksum(Tensor pieces) {
  const OnDevice device(pieces);
  STD_TORCH_CHECK(
      pieces.scalar_type() == ScalarType::Long && pieces.is_contiguous() && pieces.dim() == 2 && pieces.size(1) == 2,
      "pieces: wanted contiguous int64 of shape [count, 2]");
  const int64_t count = pieces.size(0);
  Tensor sums = new_tensor(pieces, {count});
  gohsp::cuda::ChecksumParams p{};
  p.pieces = static_cast<const int64_t*>(pointer(pieces, count * 2 * sizeof(int64_t)));
  p.sums = static_cast<uint64_t*>(pointer(sums, count * sizeof(uint64_t)));
#ifdef GOHSP_EMULATED
  for (int64_t i = 0; i < count; ++i)
    gohsp::cuda::emulate::allow(reinterpret_cast<void*>(p.pieces[2 * i]), p.pieces[2 * i + 1]);
#endif
  gohsp::cuda::launch_checksum(p, count, device.stream());
  return sums;
}

}  // namespace

#ifdef GOHSP_EMULATED
STABLE_TORCH_LIBRARY_IMPL(gohsp_kernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gohsp_kernels, CUDA, m) {
#endif
  m.impl("cuda_linear", TORCH_BOX(&cuda_linear));
  m.impl("cuda_attention", TORCH_BOX(&cuda_attention));
  m.impl("cuda_sublayers", TORCH_BOX(&cuda_sublayers));
  m.impl("cuda_checksum", TORCH_BOX(&cuda_checksum));
}

#ifndef GOHSP_EMULATED
// Why the kernels cannot run on the GPU of this number, or the empty string. Called by ctypes, which no exception may
// cross.
extern "C" __attribute__((visibility("default"))) const char* gohsp_cuda_missing(int device) noexcept {
  static thread_local std::string reason;
  try {
    reason = gohsp::cuda::missing(device);
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return reason.c_str();
}
#endif
