// SPDX-License-Identifier: Apache-2.0
// What is not a chain, as parallel loops over blocks of rows: the primitives linear and attention, and the embedding of
// patches.
#pragma once

#include "sublayers.h"

namespace gohsp::GOHSP_ISA {

// Calls body(number, worker) for each number in [0, total), taken by the workers from one counter.
template <class Body>
inline void for_each_number(const Parallel& parallel, int64_t total, const Body& body) {
  struct Loop {
    alignas(64) int64_t next;
    int64_t total;
    const Body* body;
  } loop{0, total, &body};
  parallel.run(
      min(parallel.workers, total),
      [](void* context, int64_t worker) {
        Loop& l = *static_cast<Loop*>(context);
        for (int64_t i = take_number(&l.next); i < l.total; i = take_number(&l.next)) (*l.body)(i, worker);
      },
      &loop);
}

struct LinearBuffers {
  int64_t workers, rows, ld_in, ld_out, features;
  float *in = nullptr, *out = nullptr, *row = nullptr;

  void lay_out(Arena& arena) {
    in = arena.take<float>(workers * rows * ld_in + N);
    out = arena.take<float>(workers * rows * ld_out + N);
    row = arena.take<float>(workers * row_stride(features));
  }
};

// y = the row whose kept columns are `packed`, zero elsewhere.
inline void spread_row(const float* packed, const ColumnVector* plan, int64_t features, float* y) {
  const int64_t whole = features / W * W;
  for (int64_t j = 0; j < whole; j += W, ++plan) store(y + j, expand_vector(packed, *plan));
  if (whole < features) store_first(y + whole, expand_vector(packed, *plan), features - whole);
}

// Tasks are blocks of rows times groups of panels, so that a call of few rows still has work for every worker; where
// outputs are scattered a task needs its whole rows.
inline void linear(const Matrix& weight, const Columns& gather, const Columns& scatter, Activation activation,
                   const float* x, int64_t rows, int64_t features, float* y, int64_t out_features,
                   const Parallel& parallel) {
  if (rows == 0 || out_features == 0) return;
  const bool gathers = gather.plan != nullptr, scatters = scatter.plan != nullptr;
  const int64_t blocks = ceil_div(rows, 8 * M), panels = panel_count(weight.n);
  const int64_t groups = scatters ? 1 : min(panels, ceil_div(4 * parallel.workers, blocks));

  LinearBuffers buffers{parallel.workers, ceil_div(rows, blocks), gathers ? row_stride(gather.count) : 0,
                        scatters ? row_stride(weight.n) : 0, features};
  place(buffers);

  for_each_number(parallel, blocks * groups, [&](int64_t number, int64_t worker) {
    const int64_t block = number / groups, group = number % groups;
    const int64_t r0 = part_begin(rows, blocks, block), count = part_begin(rows, blocks, block + 1) - r0;
    const float* in = x + r0 * features;
    int64_t ld_in = features;
    if (gathers) {
      float* own = buffers.in + worker * buffers.rows * buffers.ld_in;
      float* row = buffers.row + worker * row_stride(features);
      for (int64_t i = 0; i < count; ++i) {
        copy_row(in + i * features, features, row);
        compress_row(row, features, plan_of(gather), own + i * buffers.ld_in);
      }
      in = own;
      ld_in = buffers.ld_in;
    }
    if (scatters) {
      float* own = buffers.out + worker * buffers.rows * buffers.ld_out;
      store_product(Lhs(in, ld_in), count, weight, activation, own, buffers.ld_out);
      for (int64_t i = 0; i < count; ++i)
        spread_row(own + i * buffers.ld_out, plan_of(scatter), out_features, y + (r0 + i) * out_features);
      return;
    }
    multiply<Float32>({in, ld_in}, count, weight, part_begin(panels, groups, group),
                      part_begin(panels, groups, group + 1),
                      [=](int64_t r, int64_t tile_rows, int64_t n, int64_t columns, float* c) {
                        activate(activation, c, N, tile_rows, columns);
                        for (int64_t i = 0; i < tile_rows; ++i)
                          copy_row(c + i * N, columns, y + (r0 + r + i) * out_features + n);
                      });
  });
}

struct EmbedBuffers {
  int64_t workers, rows, ld, ld_bytes;
  float* patches = nullptr;
  RoundedRows rounded = {};

  void lay_out(Arena& arena) {
    patches = arena.take<float>(workers * rows * ld + N);
    const int64_t padded = ld_bytes > 0 ? workers * round_up(rows, kBlockRows) : 0;
    rounded = {arena.take<uint8_t>(padded * ld_bytes), arena.take<float>(padded), arena.take<int32_t>(padded),
               ld_bytes};
  }

  RoundedRows rounded_of(int64_t worker) const {
    const int64_t first = worker * round_up(rows, kBlockRows);
    return {rounded.values + first * ld_bytes, rounded.scales + first, rounded.zeros + first, ld_bytes};
  }
};

// Row of pixels of patch number q of an image.
inline void read_patch(const float* image, const Patches& p, int64_t q, float* to) {
  const float* corner = image + q / p.across() * p.patch_height * p.width + q % p.across() * p.patch_width;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t i = 0; i < p.patch_height; ++i, to += p.patch_width)
      copy_row(corner + (c * p.height + i) * p.width, p.patch_width, to);
}

// Tasks are blocks of patches.
inline void embed(const Matrix& weight, const Patches& p, const float* images, int64_t batch, const float* base,
                  int64_t tokens, float* y, const Parallel& parallel) {
  if (batch == 0 || tokens == 0) return;
  const int64_t n = weight.n, count = p.count(), own = tokens - count;
  const int64_t even = batch % parallel.workers == 0 ? 1 : parallel.workers;
  const int64_t blocks = max(1, min(round_up(ceil_div(count, 8 * M), even), ceil_div(count, M)));
  const bool rounds = weight.format != Format::float32;
  EmbedBuffers buffers{parallel.workers, ceil_div(count, blocks), row_stride(weight.k),
                       rounded_stride(weight.format, weight.k)};
  place(buffers);

  for_each_number(parallel, batch * blocks, [&](int64_t number, int64_t worker) {
    const int64_t image = number / blocks, block = number % blocks;
    float *patches = buffers.patches + worker * buffers.rows * buffers.ld, *to = y + image * tokens * n;
    const RoundedRows rounded = buffers.rounded_of(worker);
    const AmxTiles tiles(kHasTiles && rounds);
    if (block == 0) copy_row(base, own * n, to);
    const int64_t q0 = part_begin(count, blocks, block), rows = part_begin(count, blocks, block + 1) - q0;
    for (int64_t i = 0; i < rows; ++i) {
      read_patch(images + image * p.channels * p.height * p.width, p, q0 + i, patches + i * buffers.ld);
      round_row(weight.format, patches + i * buffers.ld, weight.k, rounded, i);
    }
    const int64_t offset = (own + q0) * n;
    multiply(rounds ? Lhs(rounded) : Lhs(patches, buffers.ld), rows, weight,
             [=](int64_t r, int64_t tile_rows, int64_t column, int64_t columns, float* c) {
               for (int64_t i = 0; i < tile_rows; ++i) {
                 const int64_t place = offset + (r + i) * n + column;
                 add_vectors(base + place, c + i * N, columns, to + place);
               }
             });
  });
}

struct AttentionBuffers {
  int64_t workers, batch, tokens, rows, qk_total, v_total;
  int64_t ld_qk = 0, ld_v = 0, ld_tokens = 0;
  float *q = nullptr, *k_t = nullptr, *v = nullptr, *keys = nullptr, *out = nullptr, *scores = nullptr;

  void lay_out(Arena& arena) {
    ld_qk = row_stride(qk_total);
    ld_v = row_stride(v_total);
    ld_tokens = row_stride(tokens);
    q = arena.take<float>(batch * tokens * ld_qk + N);
    k_t = arena.take<float>(batch * qk_total * ld_tokens + N);
    v = arena.take<float>(batch * tokens * ld_v + N);
    keys = arena.take<float>(workers * rows * ld_qk + N);
    out = arena.take<float>(workers * rows * ld_v + N);
    scores = arena.take<float>(workers * M * ld_tokens);
  }

  HeadBuffers of(int64_t image) const {
    return {q + image * tokens * ld_qk,
            k_t + image * qk_total * ld_tokens,
            v + image * tokens * ld_v,
            ld_qk,
            ld_tokens,
            ld_v};
  }
};

inline void attention(const Heads& heads, const float* qkv, const Shape& shape, float* y, const Parallel& parallel) {
  int64_t qk_total = 0, v_total = 0;
  for (int64_t h = 0; h < heads.count; ++h) {
    qk_total += heads.qk_widths[h];
    v_total += heads.v_widths[h];
  }
  if (shape.batch == 0 || shape.queries == 0 || v_total == 0) return;
  const int64_t channels = 2 * qk_total + v_total;
  const int64_t blocks = ceil_div(shape.tokens, 8 * M), query_blocks = ceil_div(shape.queries, 8 * M);
  const int64_t rows = max(ceil_div(shape.tokens, blocks), ceil_div(shape.queries, query_blocks));
  AttentionBuffers buffers{parallel.workers, shape.batch, shape.tokens, rows, qk_total, v_total};
  place(buffers);

  for_each_number(parallel, shape.batch * blocks, [&](int64_t number, int64_t worker) {
    const int64_t image = number / blocks, block = number % blocks;
    const int64_t r0 = part_begin(shape.tokens, blocks, block), r1 = part_begin(shape.tokens, blocks, block + 1);
    const HeadBuffers into = buffers.of(image);
    float* keys = buffers.keys + worker * rows * buffers.ld_qk;
    for (int64_t r = r0; r < r1; ++r) {
      const float* row = qkv + (image * shape.tokens + r) * channels;
      copy_row(row, qk_total, into.q + r * into.ldq);
      copy_row(row + qk_total, qk_total, keys + (r - r0) * buffers.ld_qk);
      copy_row(row + 2 * qk_total, v_total, into.v + r * into.ldv);
    }
    finish_queries(heads, into, r0, r1 - r0, qk_total);
    finish_keys(heads, into, r0, r1 - r0, qk_total, keys, buffers.ld_qk);
  });

  for_each_number(parallel, shape.batch * query_blocks, [&](int64_t number, int64_t worker) {
    const int64_t image = number / query_blocks, block = number % query_blocks;
    const int64_t r0 = part_begin(shape.queries, query_blocks, block);
    const int64_t r1 = part_begin(shape.queries, query_blocks, block + 1);
    float* out = buffers.out + worker * rows * buffers.ld_v;
    attend(heads, buffers.of(image), image, shape.tokens, r0, r1, buffers.scores + worker * M * buffers.ld_tokens,
           buffers.ld_tokens, out, buffers.ld_v);
    for (int64_t r = r0; r < r1; ++r)
      copy_row(out + (r - r0) * buffers.ld_v, v_total, y + (image * shape.queries + r) * v_total);
  });
}

}  // namespace gohsp::GOHSP_ISA
