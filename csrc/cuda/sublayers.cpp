// SPDX-License-Identifier: Apache-2.0
// Sublayers as sequences of launches. Nothing here knows CUDA: the same file drives the GPU and the emulation, which
// only wants to know where scratch buffers end.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels.h"

#ifdef GOHSP_EMULATED
#include "emulate/block.h"
#endif

namespace gohsp::cuda {

namespace {

#ifdef GOHSP_EMULATED
constexpr int64_t kGap = 4096;  // behind a buffer, so that a kernel that runs past it is found
void allow(void* buffer, int64_t bytes) { emulate::allow(buffer, bytes); }
#else
constexpr int64_t kGap = 0;
void allow(void*, int64_t) {}
#endif

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Whether every row begins at a multiple of 16 bytes, and so can be read 16 bytes at a time.
bool rows_aligned(const void* x, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(x) % kChunkBytes == 0 && row_bytes % kChunkBytes == 0;
}

// Hands out scratch memory, one buffer behind the other; from a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  void* take(int64_t bytes) {
    void* place = base_ == nullptr ? nullptr : base_ + used_;
    used_ += static_cast<size_t>(round_up(bytes + kGap, 256));
    if (place != nullptr) allow(place, bytes);
    return place;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Memory for the rows that a product reads, where it needs a copy.
void* room_for_rows(Workspace& w, const Input& in, const Matrix& weight, int64_t rows) {
  return in.form == InputForm::copy ? w.take(rows * weight.chunks * kChunkBytes) : nullptr;
}

struct Run {
  Precision precision;
  Stream stream;
  Float2* partials;    // of the residual stream
  bool begun = false;  // something was launched
  bool left = false;   // the stream's partials are there

  // The first launch of a call waits for whatever else is on the stream.
  bool follows() { return std::exchange(begun, true); }

  int64_t per_chunk() const { return kChunkBytes / element_bytes(precision); }

  // What the product of `weight` with x needs to know; rows of x are x_stride elements apart.
  LinearParams product(const Matrix& weight, const void* x, int64_t x_stride, int64_t rows) const {
    LinearParams p{};
    p.x = x;
    p.weight = weight.weight;
    p.chunks = static_cast<int32_t>(weight.chunks);
    p.x_stride = x_stride;
    p.rows = rows;
    p.n = static_cast<int32_t>(weight.n);
    p.bias = weight.bias;
    p.row_sum = weight.chunks > 0 ? weight.row_sum : nullptr;  // without depth there is nothing to normalise
    p.scale = weight.scale;
    p.tokens = p.queries = 1;
    return p;
  }

  // The same for an input with columns left out: launches what must run before it. With `normalise` a copy holds
  // normalised rows; in the other forms the product normalises by itself if the weight has row sums.
  LinearParams prepare(const Matrix& weight, const Input& in, void* copy, const void* x, int64_t rows, int64_t features,
                       float eps, bool normalise) {
    RowsParams r{};
    r.x = x;
    r.rows = rows;
    r.features = static_cast<int32_t>(features);
    r.aligned = rows_aligned(x, features * element_bytes(precision));
    r.eps = eps;
    if (in.form == InputForm::copy) {
      r.copy = copy;
      r.copy_stride = static_cast<int32_t>(weight.chunks * per_chunk());
      r.columns = in.list;
      r.count = static_cast<int32_t>(in.count);
      r.normalise = normalise;
      if (r.copy_stride > 0) launch_rows(precision, r, stream, follows());
      return product(weight, copy, r.copy_stride, rows);
    }
    if (!r.aligned && weight.chunks > 0) throw std::runtime_error("x: wanted rows that begin at multiples of 16 bytes");
    LinearParams p = product(weight, x, features, rows);
    p.in_chunks = in.form == InputForm::chunks ? in.list : nullptr;
    p.partials = left ? partials : nullptr;
    p.features = r.features;
    p.eps = eps;
    return p;
  }

  // Adds where the results go, and launches the product. `partials`: where it leaves LayerNorm's sums of its rows;
  // returns whether it does.
  bool finish(LinearParams p, const Output& out, void* y, const void* residual, int64_t out_features,
              Float2* partials = nullptr) {
    const int64_t bytes = element_bytes(precision);
    p.out = y;
    p.residual = residual;
    p.out_columns = out.columns;
    p.out_features = static_cast<int32_t>(out_features);
    p.out_stride = out_features;
    const auto even = [&](const void* t) { return reinterpret_cast<uintptr_t>(t) % (2 * bytes) == 0; };
    p.paired = out.columns == nullptr && out_features % 2 == 0 && even(y) && even(residual);
    p.wide =
        out.columns == nullptr && rows_aligned(y, out_features * bytes) && rows_aligned(residual, out_features * bytes);
    p.partials_out = p.wide && bytes == 2 && out_features % (2 * kPartial) == 0 ? partials : nullptr;
    launch_linear(precision, p, stream, follows());
    return p.partials_out != nullptr;
  }

  // y [images, queries, features] = x + the sublayer of x [images, tokens, features]; y may be x. In three launches: q,
  // k and v of all tokens, attention for the first `queries`, proj. The workspace is a copy: each sublayer begins anew.
  void attention(const Attention& a, const void* x, void* y, const Shape& shape, int64_t queries, Workspace w) {
    const int64_t rows = shape.images * shape.tokens, channels = a.qkv.n;
    const int64_t width = a.proj.chunks * per_chunk();
    void* copy = room_for_rows(w, a.in, a.qkv, rows);
    void* qkv = w.take(rows * channels * element_bytes(precision));
    void* heads = w.take(shape.images * queries * width * element_bytes(precision));
    if (a.head_count > 0) {
      finish(prepare(a.qkv, a.in, copy, x, rows, shape.features, a.eps, true), Output{nullptr}, qkv, nullptr, channels);
      AttentionParams p{};
      p.qkv = qkv;
      p.out = heads;
      p.heads = a.heads;
      p.qk_norm = a.qk_norm;
      p.images = shape.images;
      p.head_count = static_cast<int32_t>(a.head_count);
      p.tokens = static_cast<int32_t>(shape.tokens);
      p.queries = static_cast<int32_t>(queries);
      p.qkv_stride = channels;
      p.out_stride = width;
      p.scale = a.scale;
      p.eps = a.qk_eps;
      p.aligned = true;
      launch_attention(precision, a.widest, p, stream, follows());
    }
    LinearParams proj = product(a.proj, heads, width, shape.images * queries);
    proj.tokens = static_cast<int32_t>(shape.tokens);
    proj.queries = static_cast<int32_t>(queries);
    left = finish(proj, a.out, y, x, shape.features, partials);
  }

  // y = x + the sublayer of x [rows, features]; y may be x. In two launches.
  void mlp(const Mlp& m, const void* x, void* y, int64_t rows, int64_t features, Workspace w) {
    void* copy = room_for_rows(w, m.in, m.fc1, rows);
    void* hidden = w.take(rows * m.fc1.n * element_bytes(precision));
    LinearParams fc1 = prepare(m.fc1, m.in, copy, x, rows, features, m.eps, true);
    fc1.activation = m.activation;
    finish(fc1, Output{nullptr}, hidden, nullptr, m.fc1.n);
    left = finish(product(m.fc2, hidden, m.fc1.n, rows), m.out, y, x, features, partials);
  }
};

// Scratch memory of one sublayer, as the functions above take it.
size_t sublayer_bytes(Precision precision, const Sublayer& layer, const Shape& shape) {
  Workspace w(nullptr);
  const int64_t rows = shape.images * shape.tokens, bytes = element_bytes(precision);
  if (layer.attention != nullptr) {
    const Attention& a = *layer.attention;
    room_for_rows(w, a.in, a.qkv, rows);
    w.take(rows * a.qkv.n * bytes);
    w.take(rows * a.proj.chunks * kChunkBytes);
  } else {
    room_for_rows(w, layer.mlp->in, layer.mlp->fc1, rows);
    w.take(rows * layer.mlp->fc1.n * bytes);
  }
  return w.used();
}

int64_t last_attention(const Sublayer* layers, int64_t count) {
  while (count > 0 && layers[count - 1].attention == nullptr) --count;
  return count - 1;
}

int64_t partial_bytes(const Shape& shape) {
  return shape.images * shape.tokens * (shape.features / kPartial) * int64_t{sizeof(Float2)};
}

// Between sublayers all tokens live in a buffer of their own where fewer are wanted at the end.
int64_t stream_bytes(Precision precision, const Sublayer* layers, int64_t count, const Shape& shape) {
  const bool apart = shape.queries < shape.tokens && last_attention(layers, count) > 0;
  return apart ? shape.images * shape.tokens * shape.features * element_bytes(precision) : 0;
}

}  // namespace

size_t workspace_bytes(Precision precision, const Sublayer* layers, int64_t count, const Shape& shape) {
  size_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, sublayer_bytes(precision, layers[i], shape));
  Workspace between(nullptr);
  between.take(stream_bytes(precision, layers, count, shape));
  between.take(partial_bytes(shape));
  return most + between.used();
}

void run_sublayers(Precision precision, const Sublayer* layers, int64_t count, const void* x, void* y,
                   const Shape& shape, void* workspace, Stream stream) {
  const int64_t last = last_attention(layers, count);
  if (shape.queries < shape.tokens && last < 0) throw std::runtime_error("queries: wanted an attention in the chain");
  Workspace scratch(workspace);
  void* between = scratch.take(stream_bytes(precision, layers, count, shape));
  Run run{precision, stream, static_cast<Float2*>(scratch.take(partial_bytes(shape)))};
  // After the first sublayer each works in place: a product reads of its residual only what it writes itself.
  for (int64_t i = 0; i < count; ++i) {
    const bool all = i < last && shape.queries < shape.tokens;
    void* to = all ? between : y;
    if (layers[i].attention != nullptr)
      run.attention(*layers[i].attention, x, to, shape, i < last ? shape.tokens : shape.queries, scratch);
    else
      run.mlp(*layers[i].mlp, x, to, shape.images * (i < last ? shape.tokens : shape.queries), shape.features, scratch);
    x = to;
  }
}

size_t linear_workspace_bytes(Precision, const Input& in, const Matrix& weight, int64_t rows) {
  Workspace w(nullptr);
  room_for_rows(w, in, weight, rows);
  return w.used();
}

void run_linear(Precision precision, const Matrix& weight, const Input& in, const Output& out, Activation activation,
                const void* x, int64_t rows, int64_t features, void* y, int64_t out_features, void* workspace,
                Stream stream) {
  Run run{precision, stream, nullptr};
  Workspace w(workspace);
  void* copy = room_for_rows(w, in, weight, rows);
  LinearParams p = run.prepare(weight, in, copy, x, rows, features, 0.0f, false);
  p.activation = activation;
  run.finish(p, out, y, nullptr, out_features);
}

}  // namespace gohsp::cuda
