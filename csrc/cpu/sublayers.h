// SPDX-License-Identifier: Apache-2.0
// A chain of attention and MLP sublayers over a batch of images, run by all workers in one parallel region.
//
// The chain is cut into segments where attention needs the keys and values of all tokens:
//
//   segment 0: [MLPs]  q, k, v of the first attention
//   segment s: attention s - 1, proj, residual  [MLPs]  q, k, v of attention s
//   the last:  attention, proj, residual  [MLPs]
//
// Within a segment a block of rows depends on no other row, so one task takes its rows through all of it in buffers
// that stay in its core's cache; between segments the blocks of an image wait for each other, and images do not. A
// worker takes an image of its own while there are any, which keeps that image's keys and values in its cache and waits
// for nobody; then it helps with the images that are not finished, so that one image, the rest of a batch and a core
// that is slow or shared are all the same case. The tasks of an image are numbered so that whatever a task waits for
// has a lower number, and workers take the numbers from one counter: a waiting worker waits only for tasks that running
// workers already hold, so any number of workers makes progress, one included.
#pragma once

#include "arena.h"
#include "attention.h"
#include "throttle.h"

namespace gohsp::GOHSP_ISA {

inline int64_t take_number(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

inline bool has_come(const int32_t* counter, int32_t wanted) {
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE) >= wanted;
}

inline void wait_for(const int32_t* counter, int32_t wanted, LostTime& lost_time) {
  for (int spins = 0; spins < 200; ++spins)
    if (has_come(counter, wanted)) return;
  while (!has_come(counter, wanted)) give_way();
  lost_time.wait_until(nanoseconds());
}

// What one worker needs for a block of rows.
struct Scratch {
  float* normed;        // [rows, ld_in]       normalised, gathered rows: the left side of qkv and fc1; a row if rounded
  float* inner;         // [rows, ld_inner]    hidden activations, attention output or fresh keys
  float* packed;        // [rows, ld_packed]   outputs before their scatter
  float* scores;        // [M, ld_scores]
  float* row;           // [features + W]
  RoundedRows rounded;  // [rows, ld_bytes] the left side of a product with rounded weights
  RoundedRows hidden;   // [rows, ld_hidden] the same of fc2, where it is written while rounded is read
  PairScratch pairs;
  LostTime lost_time;
};

class Chain {
 public:
  Chain(const Sublayer* layers, int64_t count, const float* x, float* y, const Shape& shape, int64_t workers)
      : layers_(layers), count_(count), x_(x), y_(y), shape_(shape), workers_(workers) {
    measure();
    place(*this);
    prepare();
  }

  // Called by `place`.
  void lay_out(Arena& arena) {
    attentions_ = arena.take<int64_t>(segments_);
    done_ = arena.take<int32_t>(shape_.batch * segments_);
    slot_of_ = arena.take<int32_t>(shape_.batch);
    next_task_ = arena.take<int64_t>(shape_.batch);
    scratch_ = arena.take<Scratch>(workers_);
    buffers_ = arena.take<HeadBuffers>(2 * slots_);
    // A vector is read past the last kept column when a row closes up or spreads.
    const int64_t slack = N;
    for (int64_t s = 0; s < slots_; ++s) {
      float* q = arena.take<float>(shape_.tokens * ld_qk_ + slack);
      for (int64_t parity = 0; parity < 2; ++parity) {
        float* k_t = arena.take<float>(max_qk_ * ld_tokens_ + slack);
        float* v = arena.take<float>(shape_.tokens * ld_v_ + slack);
        if (arena.base != nullptr) buffers_[2 * s + parity] = {q, k_t, v, ld_qk_, ld_tokens_, ld_v_};
      }
    }
    state_ = y_;
    if (shape_.queries < shape_.tokens)
      state_ = arena.take<float>(shape_.batch * shape_.tokens * shape_.features + slack);
    for (int64_t w = 0; w < workers_; ++w) {
      Scratch s;
      s.normed = arena.take<float>(max_rows_ * ld_in_ + slack);
      s.inner = arena.take<float>(max_rows_ * ld_inner_ + slack);
      s.packed = arena.take<float>(max_rows_ * ld_packed_ + slack);
      s.scores = arena.take<float>(M * ld_tokens_);
      s.row = arena.take<float>(shape_.features + 2 * W);
      const int64_t byte_rows = ld_bytes_ > 0 ? round_up(max_rows_, kBlockRows) : 0;
      s.rounded = {arena.take<uint8_t>(byte_rows * ld_bytes_), arena.take<float>(byte_rows),
                   arena.take<int32_t>(byte_rows), ld_bytes_};
      s.hidden = {arena.take<uint8_t>(byte_rows * ld_hidden_), nullptr, nullptr, ld_hidden_};
      if (in_pairs_) s.pairs.lay_out(arena, widest_qk_, widest_v_, shape_.tokens);
      if (arena.base != nullptr) scratch_[w] = s;
    }
  }

  void run(const Parallel& parallel) {
    const int64_t begun = nanoseconds();
    parallel.run(
        workers_,
        [](void* self, int64_t worker) {
          Chain& chain = *static_cast<Chain*>(self);
          const AmxTiles tiles(chain.on_tiles_);
          chain.work(worker);
        },
        this);
    const int64_t ended = nanoseconds();
    int64_t lost = 0;
    for (int64_t w = 0; w < workers_; ++w) lost = max(lost, scratch_[w].lost_time.lost_until(ended));
    worker_throttle().report(ended - begun, lost);
  }

 private:
  void measure() {
    segments_ = 1;
    for (int64_t i = 0; i < count_; ++i) {
      const Attention* a = layers_[i].attention;
      const Mlp* m = layers_[i].mlp;
      segments_ += a != nullptr;
      const Columns &in = a != nullptr ? a->in : m->in, &out = a != nullptr ? a->out : m->out;
      ld_in_ = max(ld_in_, row_stride(in.count));
      const bool whole = out.plan == nullptr && (a != nullptr ? a->behind : m->behind) == nullptr;
      if (!whole) ld_packed_ = max(ld_packed_, row_stride(out.count));
      const Matrix &first = a != nullptr ? a->q : m->fc1, &second = a != nullptr ? a->proj : m->fc2;
      for (const Matrix* w : {&first, &second}) ld_bytes_ = max(ld_bytes_, rounded_stride(w->format, w->k));
      on_tiles_ = on_tiles_ || (kHasTiles && first.format != Format::float32);
      if (a != nullptr) {
        in_pairs_ = in_pairs_ || attends_in_pairs(a->proj.format);
        for (int64_t h = 0; h < a->heads.count; ++h) {
          widest_qk_ = max(widest_qk_, a->heads.qk_widths[h]);
          widest_v_ = max(widest_v_, a->heads.v_widths[h]);
        }
        max_qk_ = max(max_qk_, a->q.n);
        ld_qk_ = max(ld_qk_, row_stride(a->q.n));
        ld_v_ = max(ld_v_, row_stride(a->v.n));
        ld_inner_ = max(ld_inner_, max(ld_qk_, ld_v_));
      } else {
        if (rounds_tiles(m->fc2.format)) ld_hidden_ = max(ld_hidden_, rounded_stride(m->fc2.format, m->fc2.k));
        ld_inner_ = max(ld_inner_, row_stride(m->fc1.n));
      }
    }
    ld_tokens_ = row_stride(shape_.tokens);
    // Rows a task: their buffers should leave most of a 1 MB second-level cache to the panels that stream past, and
    // workers that share an image should have equally many tasks. The images that are shared are those which are left
    // when every worker has had equally many; where most are not, their number of blocks is not bent far.
    // Tiles use weights up faster than the third level brings them, and their machines have 2 MB.
    const int64_t fitting = max(2 * M, (on_tiles_ ? 330000 : 110000) / (ld_in_ + ld_inner_) / M * M);
    const int64_t left = shape_.batch % workers_;
    const int64_t sharing = left == 0 ? 1 : ceil_div(workers_, left);
    const int64_t wanted = round_up(ceil_div(shape_.tokens, fitting), left < shape_.batch ? min(sharing, 4) : sharing);
    blocks_ = min(wanted, ceil_div(shape_.tokens, M));
    last_blocks_ = shape_.queries == shape_.tokens ? blocks_ : ceil_div(shape_.queries, fitting);
    max_rows_ = max(ceil_div(shape_.tokens, blocks_), ceil_div(shape_.queries, last_blocks_));
    workers_ = max(1, min(workers_, shape_.batch * max(blocks_, last_blocks_)));
    slots_ = min(shape_.batch, workers_);
  }

  void prepare() {
    int64_t attention = 0;
    for (int64_t i = 0; i < count_; ++i)
      if (layers_[i].attention != nullptr) attentions_[attention++] = i;
    for (int64_t i = 0; i < shape_.batch * segments_; ++i) done_[i] = 0;
    for (int64_t i = 0; i < shape_.batch; ++i) slot_of_[i] = next_task_[i] = 0;
    next_image_ = 0;
  }

  int64_t blocks_of(int64_t segment) const { return segment == segments_ - 1 ? last_blocks_ : blocks_; }

  void work(int64_t worker) {
    Scratch& scratch = scratch_[worker];
    for (int64_t image = take_number(&next_image_); image < shape_.batch; image = take_number(&next_image_)) {
      // A slot is used again only while fresh images remain, and nobody helps before they are gone.
      const int64_t slot = shape_.batch <= workers_ ? image : worker;
      __atomic_store_n(slot_of_ + image, static_cast<int32_t>(slot + 1), __ATOMIC_RELEASE);
      run_image(image, scratch);
    }
    for (int64_t i = 0; i < shape_.batch; ++i) {
      const int64_t image = (worker + i) % shape_.batch;  // helpers spread over the images
      wait_for(slot_of_ + image, 1, scratch.lost_time);
      run_image(image, scratch);
    }
  }

  // Runs tasks of this image until all are taken.
  void run_image(int64_t image, Scratch& scratch) {
    const int64_t tasks = (segments_ - 1) * blocks_ + last_blocks_;
    for (int64_t task = take_number(next_task_ + image); task < tasks; task = take_number(next_task_ + image)) {
      const int64_t segment = min(task / blocks_, segments_ - 1);
      run_task(segment, image, task - segment * blocks_, scratch);
    }
  }

  void run_task(int64_t segment, int64_t image, int64_t block, Scratch& scratch) {
    int32_t* done = done_ + image * segments_;
    if (segment > 0) wait_for(done + segment - 1, static_cast<int32_t>(blocks_of(segment - 1)), scratch.lost_time);
    scratch.lost_time.begin_task(nanoseconds());
    const int64_t rows = segment == segments_ - 1 ? shape_.queries : shape_.tokens;
    run_rows(segment, image, part_begin(rows, blocks_of(segment), block),
             part_begin(rows, blocks_of(segment), block + 1), scratch);
    scratch.lost_time.end_task(nanoseconds());
    __atomic_fetch_add(done + segment, 1, __ATOMIC_RELEASE);
  }

  void run_rows(int64_t segment, int64_t image, int64_t r0, int64_t r1, const Scratch& scratch) {
    const bool last = segment == segments_ - 1;
    const int64_t features = shape_.features, rows = r1 - r0;
    int64_t layer = segment == 0 ? 0 : attentions_[segment - 1];
    const int64_t end = last ? count_ : attentions_[segment];
    const float* from = (layer == 0 ? x_ : state_) + (image * shape_.tokens + r0) * features;
    float* to = last ? y_ + (image * shape_.queries + r0) * features : state_ + (image * shape_.tokens + r0) * features;
    if (segment > 0) {
      attend_rows(layer, image, buffers(image, segment - 1), r0, r1, from, to, scratch);
      from = to;
      ++layer;
    }
    for (; layer < end; ++layer, from = to) mlp_rows(layer, rows, from, to, scratch);
    if (!last) project_rows(end, buffers(image, segment), r0, rows, segment == segments_ - 2, from, scratch);
  }

  // Keys and values of one segment are read while those of the next are written, hence two of each.
  const HeadBuffers& buffers(int64_t image, int64_t attention) const {
    return buffers_[2 * (slot_of_[image] - 1) + attention % 2];
  }

  // Gathered rows, normalised where the norm is in front, as the left side of a product with weights of the format of w.
  template <class Part>
  Lhs seen(const float* x, int64_t rows, const Part& part, const Matrix& w, const Scratch& scratch) const {
    const bool rounded = w.format != Format::float32;
    const ColumnVector* gather = plan_of(part.in);
    for (int64_t i = 0; i < rows; ++i) {
      float* to = scratch.normed + (rounded ? 0 : i * ld_in_);
      float* whole = gather == nullptr ? to : scratch.row;
      if (part.behind == nullptr) {
        normalise_row(part.norm, x + i * shape_.features, shape_.features, shape_.features, part.eps, whole);
      } else {
        copy_row(x + i * shape_.features, shape_.features, whole);
      }
      if (gather != nullptr) compress_row(scratch.row, shape_.features, gather, to);
      if (rounded) round_row(w.format, to, w.k, scratch.rounded, i);
    }
    return rounded ? Lhs(scratch.rounded) : Lhs(scratch.normed, ld_in_);
  }

  // scratch.inner, normalised where there is a norm, as the left side of a product with w.
  Lhs inner(int64_t rows, Norm norm, const InnerNorm& of, const Matrix& w, const Scratch& scratch) const {
    for (int64_t i = 0; i < rows && of.features > 0; ++i) {
      float* row = scratch.inner + i * ld_inner_;
      normalise_row(norm, row, w.k, of.features, of.eps, row);
    }
    if (w.format == Format::float32) return Lhs(scratch.inner, ld_inner_);
    for (int64_t i = 0; i < rows; ++i) round_row(w.format, scratch.inner + i * ld_inner_, w.k, scratch.rounded, i);
    return Lhs(scratch.rounded);
  }

  void project_rows(int64_t layer, const HeadBuffers& into, int64_t r0, int64_t rows, bool only_queries_wanted,
                    const float* x, const Scratch& scratch) const {
    const Attention& a = *layers_[layer].attention;
    const Lhs left = seen(x, rows, a, a.q, scratch);
    const int64_t query_rows = only_queries_wanted ? max(0, min(rows, shape_.queries - r0)) : rows;
    store_product(left, query_rows, a.q, Activation::identity, into.q + r0 * into.ldq, into.ldq);
    store_product(left, rows, a.k, Activation::identity, scratch.inner, ld_inner_);
    store_product(left, rows, a.v, Activation::identity, into.v + r0 * into.ldv, into.ldv);
    finish_queries(a.heads, into, r0, query_rows, a.q.n);
    finish_keys(a.heads, into, r0, rows, a.k.n, scratch.inner, ld_inner_);
  }

  void attend_rows(int64_t layer, int64_t image, const HeadBuffers& heads, int64_t r0, int64_t r1, const float* x,
                   float* y, const Scratch& scratch) const {
    const Attention& a = *layers_[layer].attention;
    if (attends_in_pairs(a.proj.format)) {
      attend_in_pairs(a.heads, heads, image, shape_.tokens, r0, r1, scratch.pairs, scratch.inner, ld_inner_);
    } else {
      attend(a.heads, heads, image, shape_.tokens, r0, r1, scratch.scores, ld_tokens_, scratch.inner, ld_inner_);
    }
    add_product(inner(r1 - r0, a.norm, a.inner, a.proj, scratch), r1 - r0, a.proj, a, x, y, scratch);
  }

  void mlp_rows(int64_t layer, int64_t rows, const float* x, float* y, const Scratch& scratch) const {
    const Mlp& m = *layers_[layer].mlp;
    const Lhs left = seen(x, rows, m, m.fc1, scratch);
    const bool plain = m.gate.panels == nullptr && m.inner.features == 0;
    if (plain && m.fc1.n > 0 && rounds_tiles(m.fc2.format)) {  // no tile, nothing written: fc2 may read padding
      store_rounded(left, rows, m.fc1, m.activation, m.fc2.format, scratch.hidden);
      add_product(Lhs(scratch.hidden), rows, m.fc2, m, x, y, scratch);
    } else {
      const bool gated = m.gate.panels != nullptr;
      store_product(left, rows, gated ? m.gate : m.fc1, m.activation, scratch.inner, ld_inner_);
      if (gated) multiply_by_product(left, rows, m.fc1, scratch.inner, ld_inner_);
      add_product(inner(rows, m.norm, m.inner, m.fc2, scratch), rows, m.fc2, m, x, y, scratch);
    }
  }

  // y = x + scatter(left W^T + b), or x + norm(left W^T + b); y may be x.
  template <class Part>
  void add_product(const Lhs& left, int64_t rows, const Matrix& w, const Part& part, const float* x, float* y,
                   const Scratch& scratch) const {
    const int64_t features = shape_.features;
    const ColumnVector* scatter = plan_of(part.out);
    if (scatter == nullptr && part.behind == nullptr) {
      multiply(left, rows, w, [=](int64_t r, int64_t count, int64_t n, int64_t columns, float* c) {
        for (int64_t i = 0; i < count; ++i)
          add_vectors(x + (r + i) * features + n, c + i * N, columns, y + (r + i) * features + n);
      });
      return;
    }
    store_product(left, rows, w, Activation::identity, scratch.packed, ld_packed_);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scratch.packed + i * ld_packed_;
      if (part.behind != nullptr) {
        normalise_row(part.norm, row, features, features, part.eps, row);
        scale_and_shift(row, part.behind, part.behind + features, features);
        add_vectors(x + i * features, row, features, y + i * features);
      } else {
        add_spread(x + i * features, row, scatter, features, y + i * features);
      }
    }
  }

  const Sublayer* layers_;
  int64_t count_;
  const float* x_;
  float* y_;
  Shape shape_;
  int64_t workers_;

  int64_t segments_ = 0, blocks_ = 0, last_blocks_ = 0, max_rows_ = 0, slots_ = 0, max_qk_ = 0;
  int64_t ld_in_ = 0, ld_inner_ = 0, ld_packed_ = 0, ld_qk_ = 0, ld_v_ = 0, ld_tokens_ = 0, ld_bytes_ = 0,
          ld_hidden_ = 0;
  int64_t widest_qk_ = 0, widest_v_ = 0;
  bool in_pairs_ = false;  // whether any attention has its products in bfloat16
  bool on_tiles_ = false;  // whether any products run on tile registers

  int64_t* attentions_ = nullptr;   // [segments - 1] index of each attention in layers_
  int32_t* done_ = nullptr;         // [batch, segments] blocks finished
  HeadBuffers* buffers_ = nullptr;  // [slots, 2]
  Scratch* scratch_ = nullptr;      // [workers]
  float* state_ = nullptr;          // [batch, tokens, features] residual stream
  int32_t* slot_of_ = nullptr;      // [batch] which buffers an image has, plus 1; 0 before it is begun
  int64_t* next_task_ = nullptr;    // [batch] number of the next task of each image
  alignas(64) int64_t next_image_ = 0;
};

inline void sublayers(const Sublayer* layers, int64_t count, const float* x, float* y, const Shape& shape,
                      const Parallel& parallel) {
  if (shape.batch == 0 || shape.queries == 0 || shape.features == 0) return;
  Chain(layers, count, x, y, shape, parallel.workers).run(parallel);
}

}  // namespace gohsp::GOHSP_ISA
