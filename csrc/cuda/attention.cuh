// SPDX-License-Identifier: Apache-2.0
// Softmax attention over heads whose QK and V widths differ, in one launch and without scores in memory.
//
// A block takes some tiles of 16 queries of one head of one image, a warp each, and brings its keys and values to shared
// memory: all of them at once where they are few enough, as those of most Vision Transformers are, else so many at a
// time. Each warp goes over them with the online softmax. Where there are few blocks, several warps share the keys of a
// tile and merge at the end. Widths and tokens are padded with zeros to whole fragments in shared memory only; fragments
// of nothing but padding are skipped, so a head of 24 channels costs 32, and 197 tokens cost 208. A head without QK
// channels has scores of 0: the mean of its values.
#pragma once

#include "rows.cuh"

namespace gohsp::cuda {

constexpr int kQueries = 16;  // of a tile

// WIDTH: most channels of a head. KEYS: most in shared memory at a time. WARPS: of a block at most. BLOCKS: of a
// multiprocessor, that registers must leave room for.
template <class Op_, int WIDTH_, int KEYS_, int WARPS_, int BLOCKS_>
struct AttentionTile {
  using Op = Op_;
  using T = typename Op::Element;
  static constexpr int WIDTH = WIDTH_, KEYS = KEYS_, WARPS = WARPS_, BLOCKS = BLOCKS_;
  static constexpr int ROW_BYTES = WIDTH * static_cast<int>(sizeof(T));
  static constexpr int CHUNKS = ROW_BYTES / kChunkBytes;                       // of a row
  static constexpr int PER_CHUNK = kChunkBytes / static_cast<int>(sizeof(T));  // channels
  static constexpr int STEP = 3;  // groups of 16 keys between two softmaxes
  // What a warp hands over when warps share the keys of a tile: its sums, two maxima and two totals a lane.
  static constexpr int NUMBERS = WIDTH / 8 * 4 + 4, MERGE_BYTES = NUMBERS * 32 * static_cast<int>(sizeof(float));
  static_assert(CHUNKS >= 8 && 32 % CHUNKS == 0 && KEYS % 16 == 0);
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
                            int width, bool aligned, int threads) {
  using T = typename Tile::T;
  // A thread keeps to one chunk of the rows, so that no index needs a division; those past a narrow head rest.
  const int chunk = thread_index() % Tile::CHUNKS, step = threads / Tile::CHUNKS;
  if (chunk >= 2 * fragments(width, 2 * Tile::PER_CHUNK)) return;
  const int inside = width - chunk * Tile::PER_CHUNK;  // channels from this chunk on
  int row = thread_index() / Tile::CHUNKS;
  const T* source = first + row * stride + chunk * Tile::PER_CHUNK;
  if (aligned) {
    // Of a row that is not there the address is that of the first: one that may be named, if not read.
    for (; row < rows; row += step, source += step * stride) {
      const bool there = row < count && inside > 0;
      copy_async(base + attention_chunk<Tile>(row, chunk), there ? source : first, there);
    }
    return;
  }
  // qkv of a user may put a head anywhere: number by number, and here at once.
  for (; row < rows; row += step, source += step * stride)
    for (int i = 0; i < Tile::PER_CHUNK; ++i)
      store_shared(base + attention_chunk<Tile>(row, chunk) + i * static_cast<int>(sizeof(T)),
                   row < count && i < inside ? load_global(source + i) : T{});
}

// LayerNorm over the channels of a head, in place, one warp a row; the padding stays zero.
template <class Tile>
GOHSP_DEVICE void normalise_head(uint32_t base, int rows, int width, const float* weight, const float* bias, float eps,
                                 int threads) {
  using T = typename Tile::T;
  const int lane = thread_index() % 32;
  for (int row = thread_index() / 32; row < rows; row += threads / 32) {
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
GOHSP_DEVICE void weigh_values(float acc[Tile::WIDTH / 8][4], const float p[2][4], uint32_t values, int v_width, Half) {
  using T = typename Tile::T;
  const int lane = thread_index() % 32;
  const uint32_t a[4] = {pack2<T>(p[0][0], p[0][1]), pack2<T>(p[0][2], p[0][3]), pack2<T>(p[1][0], p[1][1]),
                         pack2<T>(p[1][2], p[1][3])};
  GOHSP_UNROLL
  for (int j = 0; j < Tile::WIDTH / 16; ++j) {
    if (j >= fragments(v_width, 16)) break;
    uint32_t b[4];  // two fragments of 8 channels
    load_matrices_transposed(b, values + attention_chunk<Tile>(lane % 16, 2 * j + lane / 16));
    Tile::Op::multiply(acc[2 * j], a, b[0], b[1]);
    Tile::Op::multiply(acc[2 * j + 1], a, b[2], b[3]);
  }
}

template <class Tile>
GOHSP_DEVICE void weigh_values(float acc[Tile::WIDTH / 8][4], const float p[2][4], uint32_t values, int v_width,
                               Bfloat16) {
  weigh_values<Tile>(acc, p, values, v_width, Half{});
}

// The same for float32, 8 keys a product. A lane holds the scores of keys 2 t and 2 t + 1 and the operand wants t and
// t + 4; the order of keys in a sum is free, so the values are read in the order of the scores.
template <class Tile>
GOHSP_DEVICE void weigh_values(float acc[Tile::WIDTH / 8][4], const float p[2][4], uint32_t values, int v_width,
                               float) {
  const int lane = thread_index() % 32;
  GOHSP_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t a[4] = {bits_of(p[i][0]), bits_of(p[i][2]), bits_of(p[i][1]), bits_of(p[i][3])};
    const int row = 8 * i + lane % 4 * 2;
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WIDTH / 8; ++j) {
      if (j >= fragments(v_width, 8)) break;
      const int channel = 8 * j + lane / 4;
      Tile::Op::multiply(acc[j], a, load_shared<uint32_t>(values + attention_channel<Tile>(row, channel)),
                         load_shared<uint32_t>(values + attention_channel<Tile>(row + 1, channel)));
    }
  }
}

// Scores of a tile of queries with GROUPS groups of 16 keys. Both begin at multiples of 8 rows, so that where a chunk
// lies in its row is the same for all groups.
template <class Tile, int GROUPS>
GOHSP_DEVICE void score_keys(float scores[2 * GROUPS][4], uint32_t queries, uint32_t keys, int qk_width) {
  const int lane = thread_index() % 32;
  for (int step = 0; step < fragments(qk_width, 2 * Tile::PER_CHUNK); ++step) {
    uint32_t a[4];
    load_matrices(a, queries + attention_chunk<Tile>(lane % 16, 2 * step + lane / 16));
    GOHSP_UNROLL
    for (int j = 0; j < GROUPS; ++j) {
      uint32_t b[4];
      const int row = 16 * j + lane % 8 + lane / 16 * 8;
      load_matrices(b, keys + attention_chunk<Tile>(row, 2 * step + lane / 8 % 2));
      Tile::Op::multiply(scores[2 * j], a, b[0], b[1]);
      Tile::Op::multiply(scores[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Running maximum and sum of the exponentials of two rows of scores, those of this lane: lane / 4 and 8 further on.
struct Softmax {
  float high[2], total[2];
};

// Scores to exp2(score - maximum), 0 where there is no key; returns what the sums so far are multiplied by. `keys`: that
// are there, where not all are.
template <int GROUPS, bool all>
GOHSP_DEVICE Float2 update_softmax(Softmax& s, float scores[2 * GROUPS][4], int keys, float scale_log2) {
  float high[2] = {s.high[0], s.high[1]};
  GOHSP_UNROLL
  for (int j = 0; j < 2 * GROUPS; ++j) {
    GOHSP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool there = all || 8 * j + thread_index() % 4 * 2 + i % 2 < keys;
      scores[j][i] = there ? scores[j][i] * scale_log2 : minus_infinity();
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
  for (int j = 0; j < 2 * GROUPS; ++j) {
    GOHSP_UNROLL
    for (int i = 0; i < 4; ++i) {
      scores[j][i] = exp2_fast(scores[j][i] - high[i / 2]);
      s.total[i / 2] += scores[j][i];
    }
  }
  return {rescale[0], rescale[1]};
}

// One tile of queries with GROUPS groups of 16 keys.
template <class Tile, int GROUPS, bool all>
GOHSP_DEVICE void attend(Softmax& s, float acc[Tile::WIDTH / 8][4], uint32_t queries, uint32_t keys, uint32_t values,
                         int keys_left, int qk_width, int v_width, float scale_log2) {
  // Zeros are also the scores of a head without QK channels, which takes no step of the product.
  float scores[2 * GROUPS][4] = {};
  score_keys<Tile, GROUPS>(scores, queries, keys, qk_width);
  const Float2 rescale = update_softmax<GROUPS, all>(s, scores, keys_left, scale_log2);
  GOHSP_UNROLL
  for (int j = 0; j < Tile::WIDTH / 8; ++j) {
    acc[j][0] *= rescale.x;
    acc[j][1] *= rescale.x;
    acc[j][2] *= rescale.y;
    acc[j][3] *= rescale.y;
  }
  GOHSP_UNROLL
  for (int j = 0; j < GROUPS; ++j)
    weigh_values<Tile>(acc, scores + 2 * j, values + 16 * j * Tile::ROW_BYTES, v_width, typename Tile::T{});
}

// Where lane `lane` of the warp for part `part` of a tile leaves what it has, for the warps that it shared the keys with:
// two maxima, two totals and the sums, 128 bytes apart.
template <class Tile>
GOHSP_DEVICE uint32_t merging_place(const AttentionParams& p, int tile, int part) {
  return static_cast<uint32_t>(part * p.tiles + tile) * Tile::MERGE_BYTES + thread_index() % 32 * 4;
}

template <class Tile>
GOHSP_DEVICE void hand_over(const Softmax& s, const float acc[Tile::WIDTH / 8][4], uint32_t place) {
  GOHSP_UNROLL
  for (int r = 0; r < 2; ++r) {
    store_shared(place + r * 128, s.high[r]);
    store_shared(place + (2 + r) * 128, s.total[r]);
  }
  GOHSP_UNROLL
  for (int i = 0; i < Tile::WIDTH / 2; ++i) store_shared(place + (4 + i) * 128, acc[i / 4][i % 4]);
}

// Which fragments of its tile a warp stores, a bit each: those that share the keys share the fragments too.
GOHSP_DEVICE uint32_t fragments_of_part(const AttentionParams& p, int part) {
  uint32_t mine = 0;
  for (int j = part; j < 32; j += p.parts) mine |= 1u << j;
  return mine;
}

// From what all of them left, the totals and this warp's fragments. A part without a key has a maximum of -inf, and so
// a factor of 0; the first part has one.
template <class Tile>
GOHSP_DEVICE void merge_parts(const AttentionParams& p, Softmax& s, float acc[Tile::WIDTH / 8][4], int tile,
                              uint32_t mine) {
  GOHSP_UNROLL
  for (int r = 0; r < 2; ++r) {
    s.high[r] = minus_infinity();
    s.total[r] = 0.0f;
    for (int q = 0; q < p.parts; ++q)
      s.high[r] = max_of(s.high[r], load_shared<float>(merging_place<Tile>(p, tile, q) + r * 128));
  }
  GOHSP_UNROLL
  for (int j = 0; j < Tile::WIDTH / 8; ++j)
    for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;
  for (int q = 0; q < p.parts; ++q) {
    const uint32_t theirs = merging_place<Tile>(p, tile, q);
    float factor[2];
    GOHSP_UNROLL
    for (int r = 0; r < 2; ++r) {
      factor[r] = exp2_fast(load_shared<float>(theirs + r * 128) - s.high[r]);
      s.total[r] += factor[r] * load_shared<float>(theirs + (2 + r) * 128);
    }
    GOHSP_UNROLL
    for (int j = 0; j < Tile::WIDTH / 8; ++j) {
      if (!(mine >> j & 1)) continue;
      GOHSP_UNROLL
      for (int i = 0; i < 4; ++i) acc[j][i] += factor[i / 2] * load_shared<float>(theirs + (4 + 4 * j + i) * 128);
    }
  }
}

// The results of this lane, at 8 channels a fragment.
template <class Tile>
GOHSP_DEVICE void store_heads(const AttentionParams& p, float acc[Tile::WIDTH / 8][4], Softmax& s, int64_t image,
                              int first_query, uint32_t mine, int out_start, int v_width) {
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
      if (!(mine >> j & 1)) continue;
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
GOHSP_KERNEL(32 * Tile::WARPS, Tile::BLOCKS)
attention_kernel(const AttentionParams p) {
  using T = typename Tile::T;
  // Blocks of one head are neighbours, so they run together and share its keys and values in the L2 cache.
  const uint32_t blocks = divide_up(p.queries, kQueries * p.tiles), of_image = block_index() / blocks;
  const int first_query = static_cast<int>(block_index() % blocks) * kQueries * p.tiles;
  const int head = static_cast<int>(of_image % p.head_count);
  const int64_t image = of_image / p.head_count;
  const int32_t* entry = p.heads + 6 * head;
  const int q_start = load_global(entry), k_start = load_global(entry + 1), v_start = load_global(entry + 2);
  const int qk_width = load_global(entry + 4), v_width = load_global(entry + 5);
  const T* qkv = static_cast<const T*>(p.qkv) + image * p.tokens * p.qkv_stride;

  const int warp = thread_index() / 32, tile = warp % p.tiles, part = warp / p.tiles;
  const int threads = 32 * p.tiles * p.parts;
  const int queries = smaller(kQueries * p.tiles, p.queries - first_query);
  const int first = kQueries * tile;   // query of this warp in the block
  const bool works = first < queries;  // the others help to load
  const uint32_t my_queries = first * Tile::ROW_BYTES, keys = kQueries * p.tiles * Tile::ROW_BYTES;
  const uint32_t values = keys + 16 * fragments(smaller(p.tokens, Tile::KEYS), 16) * Tile::ROW_BYTES;

  let_next_launch_begin();
  wait_for_launch_before();
  load_head<Tile>(0, qkv + first_query * p.qkv_stride + q_start, p.qkv_stride, queries,
                  kQueries * fragments(queries, kQueries), qk_width, p.aligned, threads);
  Softmax s{{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}};
  float acc[Tile::WIDTH / 8][4] = {};
  for (int token = 0; token < p.tokens; token += Tile::KEYS) {
    const int count = smaller(Tile::KEYS, p.tokens - token), groups = fragments(count, 16);
    if (token > 0) barrier();  // all are done with the keys and values before
    const T* row = qkv + token * p.qkv_stride;
    load_head<Tile>(keys, row + k_start, p.qkv_stride, count, 16 * groups, qk_width, p.aligned, threads);
    load_head<Tile>(values, row + v_start, p.qkv_stride, count, 16 * groups, v_width, p.aligned, threads);
    commit();
    wait_copies<0>();
    barrier();
    if (p.qk_norm != nullptr) {
      if (token == 0) normalise_head<Tile>(0, queries, qk_width, p.qk_norm, p.qk_norm + qk_width, p.eps, threads);
      const float* k_norm = p.qk_norm + 2 * qk_width;
      normalise_head<Tile>(keys, count, qk_width, k_norm, k_norm + qk_width, p.eps, threads);
      barrier();
    }
    if (!works) continue;
    const float scale_log2 = p.scale * 1.44269504f;
    const int share = divide_up(groups, p.parts), end = smaller((part + 1) * share, groups);
    int group = part * share;
    uint32_t at = 16 * group * Tile::ROW_BYTES;
    for (; group + Tile::STEP <= smaller(end, count / 16); group += Tile::STEP, at += 16 * Tile::STEP * Tile::ROW_BYTES)
      attend<Tile, Tile::STEP, true>(s, acc, my_queries, keys + at, values + at, 0, qk_width, v_width, scale_log2);
    for (; group < end; ++group, at += 16 * Tile::ROW_BYTES)
      attend<Tile, 1, false>(s, acc, my_queries, keys + at, values + at, count - 16 * group, qk_width, v_width,
                             scale_log2);
  }
  const uint32_t mine = p.parts == 1 ? ~0u : fragments_of_part(p, part);
  if (p.parts > 1) {
    barrier();  // all are done with the keys and values
    if (works) hand_over<Tile>(s, acc, merging_place<Tile>(p, tile, part));
    barrier();
    if (works) merge_parts<Tile>(p, s, acc, tile, mine);
  }
  if (works) store_heads<Tile>(p, acc, s, image, first_query + first, mine, load_global(entry + 3), v_width);
}

}  // namespace gohsp::cuda
