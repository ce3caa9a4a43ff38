// SPDX-License-Identifier: Apache-2.0
// Softmax attention over heads whose QK and V widths differ, in one launch and without scores in memory.
//
// A block takes 64 queries of one head of one image, 16 a warp, and goes over the keys with the online softmax. Keys
// travel while the values of the step before are multiplied, and values while the scores are. Widths and tokens are
// padded with zeros to whole fragments in shared memory only; fragments of nothing but padding are skipped, so a head
// of 24 channels costs 32, and 197 tokens cost 208. A head without QK channels has scores of 0: the mean of its values.
#pragma once

#include "rows.cuh"

namespace gohsp::cuda {

constexpr int kAttentionThreads = 128, kAttentionQueries = 64;

// WIDTH: most channels of a head. KEYS: of a step. BLOCKS: of a multiprocessor, that registers must leave room for.
template <class Op_, int WIDTH_, int KEYS_, int BLOCKS_>
struct AttentionTile {
  using Op = Op_;
  using T = typename Op::Element;
  static constexpr int WIDTH = WIDTH_, KEYS = KEYS_, BLOCKS = BLOCKS_;
  static constexpr int ROW_BYTES = WIDTH * static_cast<int>(sizeof(T));
  static constexpr int CHUNKS = ROW_BYTES / kChunkBytes;                       // of a row
  static constexpr int PER_CHUNK = kChunkBytes / static_cast<int>(sizeof(T));  // channels
  static constexpr int Q = 0, K = kAttentionQueries * ROW_BYTES, V = K + KEYS * ROW_BYTES;
  static constexpr int SHARED_BYTES = V + KEYS * ROW_BYTES;
  static_assert(CHUNKS >= 8 && kAttentionThreads % CHUNKS == 0);
};

// Where a chunk of a row lies. The order turns with the row: 8 rows at one chunk lie in different banks.
template <class Tile>
GOHSP_DEVICE uint32_t attention_chunk(int row, int chunk) {
  return row * Tile::ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// Where one channel of a row lies.
template <class Tile>
GOHSP_DEVICE uint32_t attention_channel(int row, int channel) {
  return attention_chunk<Tile>(row, channel / Tile::PER_CHUNK) +
         channel % Tile::PER_CHUNK * static_cast<int>(sizeof(typename Tile::T));
}

// Fragments that `n` rows or channels take.
GOHSP_DEVICE int fragments(int n, int size) { return divide_up(n, size); }

// Brings `count` rows of one head's q, k or v to shared memory: `width` channels, zeros up to whole fragments of 32
// bytes, and rows of zeros up to `rows`.
template <class Tile>
GOHSP_DEVICE void load_head(uint32_t base, const typename Tile::T* first, int64_t stride, int count, int rows,
                            int width, bool aligned) {
  using T = typename Tile::T;
  // A thread keeps to one chunk of the rows, so that no index needs a division; those past a narrow head rest.
  const int chunk = thread_index() % Tile::CHUNKS;
  if (chunk >= 2 * fragments(width, 2 * Tile::PER_CHUNK)) return;
  for (int row = thread_index() / Tile::CHUNKS; row < rows; row += kAttentionThreads / Tile::CHUNKS) {
    // Of a row that is not there the address is that of the first: one that may be named, if not read.
    const T* source = first + (row < count ? row : 0) * stride + chunk * Tile::PER_CHUNK;
    const uint32_t to = base + attention_chunk<Tile>(row, chunk);
    if (aligned) {
      const bool inside = row < count && chunk * Tile::PER_CHUNK < width;
      copy_async(to, inside ? source : first, inside);
      continue;
    }
    // qkv of a user may put a head anywhere: number by number, and here at once.
    for (int i = 0; i < Tile::PER_CHUNK; ++i) {
      const bool inside = row < count && chunk * Tile::PER_CHUNK + i < width;
      store_shared(to + i * static_cast<int>(sizeof(T)), inside ? load_global(source + i) : T{});
    }
  }
}

// LayerNorm over the channels of a head, in place, one warp a row; the padding stays zero.
template <class Tile>
GOHSP_DEVICE void normalise_head(uint32_t base, int rows, int width, const float* weight, const float* bias,
                                 float eps) {
  using T = typename Tile::T;
  const int lane = thread_index() % 32;
  for (int row = thread_index() / 32; row < rows; row += kAttentionThreads / 32) {
    float sum = 0.0f, squares = 0.0f;
    for (int c = lane; c < width; c += 32) sum += to_float(load_shared<T>(base + attention_channel<Tile>(row, c)));
    const float mean = sum_of_warp(sum) / width;
    for (int c = lane; c < width; c += 32) {
      const float x = to_float(load_shared<T>(base + attention_channel<Tile>(row, c))) - mean;
      squares += x * x;
    }
    const float rstd = rsqrt_fast(sum_of_warp(squares) / width + eps);
    for (int c = lane; c < width; c += 32) {
      const uint32_t place = base + attention_channel<Tile>(row, c);
      const float x = (to_float(load_shared<T>(place)) - mean) * rstd;
      store_shared(place, from_float<T>(x * load_global(weight + c) + load_global(bias + c)));
    }
  }
}

// acc += p v for 16 keys of 16 bits: the scores of two fragments are one fragment of the left operand.
template <class Tile>
GOHSP_DEVICE void weigh_values(float acc[Tile::WIDTH / 8][4], const float p[2][4], int key, int v_width, Half) {
  using T = typename Tile::T;
  const int lane = thread_index() % 32;
  const uint32_t a[4] = {pack2<T>(p[0][0], p[0][1]), pack2<T>(p[0][2], p[0][3]), pack2<T>(p[1][0], p[1][1]),
                         pack2<T>(p[1][2], p[1][3])};
  GOHSP_UNROLL
  for (int j = 0; j < Tile::WIDTH / 16; ++j) {
    if (j >= fragments(v_width, 16)) break;
    uint32_t b[4];  // two fragments of 8 channels
    load_matrices_transposed(b, Tile::V + attention_chunk<Tile>(key + lane % 16, 2 * j + lane / 16));
    Tile::Op::multiply(acc[2 * j], a, b[0], b[1]);
    Tile::Op::multiply(acc[2 * j + 1], a, b[2], b[3]);
  }
}

template <class Tile>
GOHSP_DEVICE void weigh_values(float acc[Tile::WIDTH / 8][4], const float p[2][4], int key, int v_width, Bfloat16) {
  weigh_values<Tile>(acc, p, key, v_width, Half{});
}

// The same for float32, 8 keys a product. A lane holds the scores of keys 2 t and 2 t + 1 and the operand wants t and
// t + 4; the order of keys in a sum is free, so the values are read in the order of the scores.
template <class Tile>
GOHSP_DEVICE void weigh_values(float acc[Tile::WIDTH / 8][4], const float p[2][4], int key, int v_width, float) {
  const int lane = thread_index() % 32;
  GOHSP_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t a[4] = {bits_of(p[i][0]), bits_of(p[i][2]), bits_of(p[i][1]), bits_of(p[i][3])};
    const int row = key + 8 * i + lane % 4 * 2;
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WIDTH / 8; ++j) {
      if (j >= fragments(v_width, 8)) break;
      const int channel = 8 * j + lane / 4;
      Tile::Op::multiply(acc[j], a, load_shared<uint32_t>(Tile::V + attention_channel<Tile>(row, channel)),
                         load_shared<uint32_t>(Tile::V + attention_channel<Tile>(row + 1, channel)));
    }
  }
}

// Scores of this warp's 16 queries with the keys of a step, 16 keys at a time, `groups` of them.
template <class Tile>
GOHSP_DEVICE void score_keys(float scores[Tile::KEYS / 8][4], int warp, int groups, int qk_width) {
  const int lane = thread_index() % 32;
  for (int step = 0; step < fragments(qk_width, 2 * Tile::PER_CHUNK); ++step) {
    uint32_t a[4];
    load_matrices(a, Tile::Q + attention_chunk<Tile>(16 * warp + lane % 16, 2 * step + lane / 16));
    GOHSP_UNROLL
    for (int j = 0; j < Tile::KEYS / 16; ++j) {
      if (j >= groups) break;
      uint32_t b[4];
      load_matrices(b, Tile::K + attention_chunk<Tile>(16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      Tile::Op::multiply(scores[2 * j], a, b[0], b[1]);
      Tile::Op::multiply(scores[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Running maximum and sum of the exponentials of two rows of scores, those of this lane: lane / 4 and 8 further on.
struct Softmax {
  float high[2], total[2];
};

// Scores to exp2(score - maximum), 0 for keys that are not there; returns what the sums so far are multiplied by.
template <class Tile>
GOHSP_DEVICE Float2 update_softmax(Softmax& s, float scores[Tile::KEYS / 8][4], int keys, float scale_log2) {
  float high[2] = {s.high[0], s.high[1]};
  GOHSP_UNROLL
  for (int j = 0; j < Tile::KEYS / 8; ++j) {
    GOHSP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * j + thread_index() % 4 * 2 + i % 2;
      scores[j][i] = key < keys ? scores[j][i] * scale_log2 : minus_infinity();
      high[i / 2] = max_of(high[i / 2], scores[j][i]);
    }
  }
  // The four lanes of a row agree on its maximum. It is finite: each step has a key that is there.
  float rescale[2];
  GOHSP_UNROLL
  for (int r = 0; r < 2; ++r) {
    high[r] = max_of(high[r], shuffle_xor(high[r], 1));
    high[r] = max_of(high[r], shuffle_xor(high[r], 2));
    rescale[r] = exp2_fast(s.high[r] - high[r]);
    s.high[r] = high[r];
    s.total[r] *= rescale[r];
  }
  GOHSP_UNROLL
  for (int j = 0; j < Tile::KEYS / 8; ++j) {
    GOHSP_UNROLL
    for (int i = 0; i < 4; ++i) {
      scores[j][i] = exp2_fast(scores[j][i] - high[i / 2]);
      s.total[i / 2] += scores[j][i];
    }
  }
  return {rescale[0], rescale[1]};
}

// The results of this lane, at 8 channels a fragment.
template <class Tile>
GOHSP_DEVICE void store_heads(const AttentionParams& p, float acc[Tile::WIDTH / 8][4], Softmax& s, int64_t image,
                              int first_query, int out_start, int v_width) {
  using T = typename Tile::T;
  const int lane = thread_index() % 32;
  // The four lanes of a row have summed two keys of eight each; all lanes take part before any has nothing to store.
  GOHSP_UNROLL
  for (int r = 0; r < 2; ++r) {
    s.total[r] += shuffle_xor(s.total[r], 1);
    s.total[r] += shuffle_xor(s.total[r], 2);
  }
  GOHSP_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + lane / 4 + 8 * r;
    if (query >= p.queries) continue;
    const float share = 1.0f / s.total[r];
    T* out = static_cast<T*>(p.out) + (image * p.queries + query) * p.out_stride + out_start;
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WIDTH / 8; ++j) {
      const int channel = 8 * j + lane % 4 * 2;
      const T x = from_float<T>(acc[j][2 * r] * share), y = from_float<T>(acc[j][2 * r + 1] * share);
      if (p.aligned && channel < v_width) {  // then widths are even, and so are the places
        store_global(reinterpret_cast<Pair<T>*>(out + channel), Pair<T>{x, y});
        continue;
      }
      if (channel < v_width) store_global(out + channel, x);
      if (channel + 1 < v_width) store_global(out + channel + 1, y);
    }
  }
}

template <class Tile>
GOHSP_KERNEL(kAttentionThreads, Tile::BLOCKS)
attention_kernel(const AttentionParams p) {
  using T = typename Tile::T;
  // Tiles of one head are neighbours, so they run together and share its keys and values in the L2 cache.
  const int tiles = divide_up(p.queries, kAttentionQueries);
  const int first_query = static_cast<int>(block_index() % tiles) * kAttentionQueries;
  const int head = static_cast<int>(block_index() / tiles % p.head_count);
  const int64_t image = block_index() / tiles / p.head_count;
  const int32_t* entry = p.heads + 6 * head;
  const int q_start = load_global(entry), k_start = load_global(entry + 1), v_start = load_global(entry + 2);
  const int out_start = load_global(entry + 3), qk_width = load_global(entry + 4), v_width = load_global(entry + 5);
  const T* qkv = static_cast<const T*>(p.qkv) + image * p.tokens * p.qkv_stride;

  const int warp = thread_index() / 32;
  const int queries = smaller(kAttentionQueries, p.queries - first_query);
  const int query_rows = 16 * fragments(queries, 16);
  const bool works = 16 * warp < queries;  // the others help to load
  const auto load_keys = [&](uint32_t base, int first, int start, int width) {
    const int count = smaller(Tile::KEYS, p.tokens - first);
    load_head<Tile>(base, qkv + first * p.qkv_stride + start, p.qkv_stride, count, 16 * fragments(count, 16), width,
                    p.aligned);
    commit();
  };
  // The queries belong to the first group of copies, with the first keys.
  load_head<Tile>(Tile::Q, qkv + first_query * p.qkv_stride + q_start, p.qkv_stride, queries, query_rows, qk_width,
                  p.aligned);
  load_keys(Tile::K, 0, k_start, qk_width);

  Softmax s{{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}};
  float acc[Tile::WIDTH / 8][4] = {};
  for (int first = 0; first < p.tokens; first += Tile::KEYS) {
    const int keys = smaller(Tile::KEYS, p.tokens - first), groups = fragments(keys, 16);
    wait_copies<0>();
    barrier();  // the keys have arrived for all, and all are done with the values before
    if (p.qk_norm != nullptr) {
      if (first == 0) normalise_head<Tile>(Tile::Q, queries, qk_width, p.qk_norm, p.qk_norm + qk_width, p.eps);
      const float* k_norm = p.qk_norm + 2 * qk_width;
      normalise_head<Tile>(Tile::K, keys, qk_width, k_norm, k_norm + qk_width, p.eps);
      barrier();
    }
    load_keys(Tile::V, first, v_start, v_width);
    // Zeros are also the scores of a head without QK channels, which takes no step of the product.
    float scores[Tile::KEYS / 8][4] = {};
    Float2 rescale{1.0f, 1.0f};
    if (works) {
      score_keys<Tile>(scores, warp, groups, qk_width);
      rescale = update_softmax<Tile>(s, scores, keys, p.scale * 1.44269504f);
    }
    wait_copies<0>();
    barrier();  // the values have arrived for all, and all are done with the keys
    if (first + Tile::KEYS < p.tokens) load_keys(Tile::K, first + Tile::KEYS, k_start, qk_width);
    if (!works) continue;
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WIDTH / 8; ++j) {
      acc[j][0] *= rescale.x;
      acc[j][1] *= rescale.x;
      acc[j][2] *= rescale.y;
      acc[j][3] *= rescale.y;
    }
    GOHSP_UNROLL
    for (int j = 0; j < Tile::KEYS / 16; ++j)
      if (j < groups) weigh_values<Tile>(acc, scores + 2 * j, 16 * j, v_width, T{});
  }
  if (works) store_heads<Tile>(p, acc, s, image, first_query + 16 * warp, out_start, v_width);
}

}  // namespace gohsp::cuda
