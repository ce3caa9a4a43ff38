// SPDX-License-Identifier: Apache-2.0
// Attention over heads of any widths, for a block of query rows.
//
// For M queries of one head at a time: their scores against all keys (M x tokens, some 10 to 50 KB, in cache and never
// in memory as a whole), softmax in place, product with the values. Keys are held transposed, a row of tokens for each
// channel, so that both products are the row-times-panel kernel of formats/float32.h: any number of QK channels is just its loop
// count, and zero of them leaves scores of zero, whose softmax is the mean. Values keep all heads side by side in a row;
// lanes past a head's width compute on its neighbour's values and are overwritten by that neighbour.
#pragma once

#include "rows.h"

namespace gohsp::GOHSP_ISA {

// Where the q, k and v of one image are. Queries and values by token, keys by channel.
struct HeadBuffers {
  float* q;    // [tokens, ldq]
  float* k_t;  // [sum of QK widths, ldk]
  float* v;    // [tokens, ldv]
  int64_t ldq, ldk, ldv;
};

// Where the biases of one image and head are, row by row; without values where there are none.
struct BiasRows {
  const float* values;
  int64_t ld;

  const float* row(int64_t query) const { return values == nullptr ? nullptr : values + query * ld; }
};

inline BiasRows bias_of(const ScoreBias& bias, int64_t image, int64_t head, int64_t heads) {
  if (bias.values == nullptr) return {};
  const int64_t ld = ScoreBias::row_stride_of(bias.tokens);
  return {bias.values + (image % bias.groups * heads + head) * bias.tokens * ld, ld};
}

// Softmax of s[0:tokens] + bias without its division: s becomes exp(s - max), the result is 1 / sum.
inline float softmax_row(float* s, const float* bias, int64_t tokens) {
  const int64_t padded = round_up(tokens, W);
  if (bias != nullptr)
    for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) + load(bias + j));
  for (int64_t j = tokens; j < padded; ++j) s[j] = -__builtin_inff();
  Vec top = load(s);
  for (int64_t j = W; j < padded; j += W) top = larger(load(s + j), top);
  const float highest = max_lanes(top);
  Vec sum = {};
  for (int64_t j = 0; j < padded; j += W) {
    const Vec e = exp(load(s + j) - highest);
    store(s + j, e);
    sum += e;
  }
  return 1.0f / sum_lanes(sum);
}

// out[0:rows, 0:width] = softmax(q K^T) V for one head. scores: [M, ld_scores] scratch. out may overrun by a tile.
inline void attend_tile(const float* q, const HeadBuffers& from, const float* k_t, const float* v, int64_t qk_width,
                        int64_t v_width, const BiasRows& bias, int64_t r0, int64_t rows, int64_t tokens, float* scores,
                        int64_t ld_scores, float* out, int64_t ldo) {
  for (int64_t j = 0; j < tokens; j += N) {
    const int64_t vectors = min(NV, ceil_div(tokens - j, W));
    kTiles<Float32>.of[rows][vectors](q, from.ldq, k_t + j, from.ldk, kZeros, qk_width, scores + j, ld_scores,
                                      {k_t + j, 0});
  }
  float inverse[M];
  for (int64_t i = 0; i < rows; ++i) inverse[i] = softmax_row(scores + i * ld_scores, bias.row(r0 + i), tokens);
  for (int64_t c = 0; c < v_width; c += N) {
    const int64_t vectors = min(NV, ceil_div(v_width - c, W));
    kTiles<Float32>.of[rows][vectors](scores, ld_scores, v + c, from.ldv, kZeros, tokens, out + c, ldo, {v + c, 0});
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = c; j < c + vectors * W; j += W) store(out + i * ldo + j, load(out + i * ldo + j) * inverse[i]);
  }
}

// What attention in pairs needs beside the heads: for kBlockRows queries of one head at a time.
struct PairScratch {
  float* row;        // a query
  RoundedRows left;  // [kBlockRows, ld] queries, then what the softmax made of their scores
  float* keys;       // [pairs of channels, ld_keys]
  float* values;     // [pairs of tokens, ld_values]
  float* scores;     // [kBlockRows, ld_keys]
  int64_t ld_keys, ld_values;

  template <class Arena>
  void lay_out(Arena& arena, int64_t widest_qk, int64_t widest_v, int64_t tokens) {
    ld_keys = row_stride(tokens);
    ld_values = row_stride(widest_v);
    const int64_t ld = (ceil_div(pair_bytes(max(widest_qk, tokens)), 64) | 1) * 64;
    row = arena.template take<float>(row_stride(widest_qk));
    left = {arena.template take<uint8_t>(kBlockRows * ld), nullptr, nullptr, ld};
    keys = arena.template take<float>(pairs_of(widest_qk) * ld_keys);
    values = arena.template take<float>(pairs_of(tokens) * ld_values);
    scores = arena.template take<float>(kBlockRows * ld_keys);
  }
};

// Attention of query rows [r0, r1) of an image into out[r1 - r0, ldo], all heads side by side.
inline void attend(const Heads& heads, const HeadBuffers& from, int64_t image, int64_t tokens, int64_t r0, int64_t r1,
                   float* scores, int64_t ld_scores, float* out, int64_t ldo) {
  const int64_t rows = r1 - r0, tiles = ceil_div(rows, M);
  int64_t qk_start = 0, v_start = 0;
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t qk_width = heads.qk_widths[h], v_width = heads.v_widths[h];
    const BiasRows bias = bias_of(heads.bias, image, h, heads.count);
    for (int64_t t = 0; t < tiles && v_width > 0; ++t) {
      const int64_t i0 = part_begin(rows, tiles, t), i1 = part_begin(rows, tiles, t + 1);
      attend_tile(from.q + (r0 + i0) * from.ldq + qk_start, from, from.k_t + qk_start * from.ldk, from.v + v_start,
                  qk_width, v_width, bias, r0 + i0, i1 - i0, tokens, scores, ld_scores, out + i0 * ldo + v_start, ldo);
    }
    qk_start += qk_width;
    v_start += v_width;
  }
}

// The same with the products of pairs in formats/bfloat16.h. Keys and values become pairs once a head and block of queries,
// which costs less than a hundredth of what follows; softmax stays in fp32.
inline void attend_in_pairs(const Heads& heads, const HeadBuffers& from, int64_t image, int64_t tokens, int64_t r0,
                            int64_t r1, const PairScratch& s, float* out, int64_t ldo) {
  const int64_t tiles = ceil_div(r1 - r0, kBlockRows);
  int64_t qk_start = 0, v_start = 0;
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t qk_width = heads.qk_widths[h], v_width = heads.v_widths[h];
    const BiasRows bias = bias_of(heads.bias, image, h, heads.count);
    pair_rows(from.k_t + qk_start * from.ldk, from.ldk, qk_width, tokens, s.keys, s.ld_keys);
    pair_rows(from.v + v_start, from.ldv, tokens, v_width, s.values, s.ld_values);
    for (int64_t t = 0; t < tiles && v_width > 0; ++t) {
      const int64_t i0 = r0 + part_begin(r1 - r0, tiles, t), rows = r0 + part_begin(r1 - r0, tiles, t + 1) - i0;
      for (int64_t i = 0; i < rows; ++i) {
        copy_row(from.q + (i0 + i) * from.ldq + qk_start, qk_width, s.row);
        narrow_row(s.row, qk_width, s.left, i);
      }
      multiply_pairs(s.left, rows, qk_width, s.keys, s.ld_keys, tokens, s.scores, s.ld_keys);
      float inverse[kBlockRows];
      for (int64_t i = 0; i < rows; ++i) {
        inverse[i] = softmax_row(s.scores + i * s.ld_keys, bias.row(i0 + i), tokens);
        narrow_row(s.scores + i * s.ld_keys, tokens, s.left, i);
      }
      alignas(64) float c[kBlockRows * N];
      for (int64_t j = 0; j < v_width; j += N) {
        const int64_t columns = min(N, v_width - j);
        multiply_pairs(s.left, rows, tokens, s.values + j, s.ld_values, columns, c, N);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t n = 0; n < columns; n += W)
            store(out + (i0 - r0 + i) * ldo + v_start + j + n, load(c + i * N + n) * inverse[i]);
      }
    }
    qk_start += qk_width;
    v_start += v_width;
  }
}

// The norm over the channels of each head of one row, in place; weight and bias are shared by the heads.
inline void normalise_heads(const Heads& heads, const float* weight, const float* bias, float* row) {
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t width = heads.qk_widths[h];
    float mean = 0.0f, variance = 0.0f;
    if (heads.norm == Norm::layer)
      for (int64_t c = 0; c < width; ++c) mean += row[c];
    mean /= static_cast<float>(width);
    for (int64_t c = 0; c < width; ++c) variance += (row[c] - mean) * (row[c] - mean);
    const float scale = 1.0f / __builtin_sqrtf(variance / static_cast<float>(width) + heads.qk_eps);
    for (int64_t c = 0; c < width; ++c) row[c] = (row[c] - mean) * scale * weight[c] + bias[c];
    row += width;
  }
}

// Divides the channels of each head of one row by their length, in place, and multiplies them by a factor for the head.
inline void give_length(const Heads& heads, const float* factors, float* row) {
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t width = heads.qk_widths[h];
    float squares = 0.0f;
    for (int64_t c = 0; c < width; ++c) squares += row[c] * row[c];
    const float length = __builtin_sqrtf(squares);
    const float scale = (factors == nullptr ? 1.0f : factors[h]) / (length > 1e-12f ? length : 1e-12f);
    for (int64_t c = 0; c < width; ++c) row[c] *= scale;
    row += width;
  }
}

// Turns the pairs of channels of one row, in place, by the angles of its token.
inline void turn_heads(const Heads& heads, int64_t token, float* row) {
  const Rope& rope = heads.rope;
  const float* cos = rope.angles + token * rope.pairs;
  const float* sin = cos + rope.tokens * rope.pairs;
  int64_t pair = 0;
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t half = heads.qk_widths[h] / 2;
    if (pair == rope.pairs) pair = 0;  // the angles of one head are those of all
    float *a = row, *b = row + half;
    const int64_t whole = half / W * W;
    for (int64_t c = 0; c < whole; c += W) {
      const Vec x = load(a + c), y = load(b + c), u = load(cos + pair + c), v = load(sin + pair + c);
      store(a + c, x * u - y * v);
      store(b + c, y * u + x * v);
    }
    for (int64_t c = whole; c < half; ++c) {
      const float x = a[c], y = b[c], u = cos[pair + c], v = sin[pair + c];
      a[c] = x * u - y * v;
      b[c] = y * u + x * v;
    }
    row += 2 * half;
    pair += half;
  }
}

// Brings fresh query rows [r0, r0 + rows) to their final form, in place.
inline void finish_queries(const Heads& heads, const HeadBuffers& into, int64_t r0, int64_t rows, int64_t channels) {
  const int64_t width = heads.count > 0 ? heads.qk_widths[0] : 0;
  for (int64_t i = r0; i < r0 + rows; ++i) {
    float* q = into.q + i * into.ldq;
    if (heads.qk_norm != nullptr) normalise_heads(heads, heads.qk_norm, heads.qk_norm + width, q);
    if (heads.cosine != nullptr) give_length(heads, heads.cosine, q);
    if (heads.rope.angles != nullptr) turn_heads(heads, i, q);
    if (heads.scale != 1.0f)
      for (int64_t c = 0; c < channels; ++c) q[c] *= heads.scale;
  }
}

// Brings fresh key rows [rows, ld_keys] to their final form and puts them into tokens [r0, r0 + rows) of the
// transposed buffer.
inline void finish_keys(const Heads& heads, const HeadBuffers& into, int64_t r0, int64_t rows, int64_t channels,
                        float* keys, int64_t ld_keys) {
  const int64_t width = heads.count > 0 ? heads.qk_widths[0] : 0;
  for (int64_t i = 0; i < rows; ++i) {
    float* k = keys + i * ld_keys;
    if (heads.qk_norm != nullptr) normalise_heads(heads, heads.qk_norm + 2 * width, heads.qk_norm + 3 * width, k);
    if (heads.cosine != nullptr) give_length(heads, nullptr, k);
    if (heads.rope.angles != nullptr) turn_heads(heads, r0 + i, k);
  }
  transpose(keys, ld_keys, rows, channels, into.k_t + r0, into.ldk);
}

}  // namespace gohsp::GOHSP_ISA
