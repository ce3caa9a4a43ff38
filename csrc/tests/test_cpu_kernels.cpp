// SPDX-License-Identifier: Apache-2.0
// The CPU kernels without torch: against plain loops in double, for each instruction set of the machine, whether
// workers run one after another or at once. Runs under an emulator too, which is how NEON is tested on x86.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/throttle.h"

#ifdef GOHSP_PORTABLE_TEST
// Built a second time with all x86 texts compiled for the baseline: the wide code is then tested where the wide
// instructions are missing.
#define GOHSP_ISA_SET(name, processor, runs_here, options) GOHSP_DECLARE_##processor(name)
#define GOHSP_DECLARE_x86_64(name) \
  namespace gohsp::name {          \
  extern const KernelTable table;  \
  }
#define GOHSP_DECLARE_aarch64(name)
#define GOHSP_DECLARE_any(name)
#include "../cpu/isa/isa.def"
#undef GOHSP_ISA_SET
#endif

namespace {

const gohsp::KernelTable* table(const char* name) {
#ifdef GOHSP_PORTABLE_TEST
#define GOHSP_ISA_SET(name, processor, runs_here, options) GOHSP_FIND_##processor(name)
#define GOHSP_FIND_x86_64(set) \
  if (std::strcmp(name, #set) == 0) return &gohsp::set::table;
#define GOHSP_FIND_aarch64(set)
#define GOHSP_FIND_any(set)
#include "../cpu/isa/isa.def"
#undef GOHSP_ISA_SET
#endif
  return gohsp::kernels(name);
}

using gohsp::Columns;
using gohsp::Direction;
using gohsp::Format;
using gohsp::Matrix;
using Floats = std::vector<float>;
using Indices = std::vector<int64_t>;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED %s\n", what);
  ++failures;
}

void expect_close(const Floats& result, const std::vector<double>& truth, const std::string& what,
                  double tolerance = 2e-6) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (result[i] - truth[i]) * (result[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  const double relative = std::sqrt(error / (norm + 1e-30));
  if (result.size() == truth.size() && relative < tolerance) return;  // false for NaN as well
  std::printf("FAILED %s: relative error %g\n", what.c_str(), relative);
  ++failures;
}

struct Random {
  std::mt19937 engine;
  Floats normal(int64_t count, double scale = 1.0) {
    std::normal_distribution<float> distribution(0.0f, static_cast<float>(scale));
    Floats values(static_cast<size_t>(count));
    for (float& v : values) v = distribution(engine);
    return values;
  }
  Indices columns(int64_t features, double keep) {
    std::bernoulli_distribution kept(keep);
    Indices result;
    for (int64_t i = 0; i < features; ++i)
      if (kept(engine)) result.push_back(i);
    return result;
  }
};

// A row that became integers and back: what an int8 product reads.
std::vector<double> in_levels(std::vector<double> x, double levels) {
  float low = 0, high = 0;
  for (double v : x) {
    low = std::min(low, static_cast<float>(v));
    high = std::max(high, static_cast<float>(v));
  }
  const float range = high - low, scale = range / static_cast<float>(levels);
  const double inverse = range < 1e-30f ? 0.0 : static_cast<float>(levels) / range;
  const double zero = std::nearbyint(-low * inverse);
  for (double& v : x) {
    const double byte = std::nearbyint(static_cast<float>(v) * inverse + zero);
    v = (std::min(std::max(byte, 0.0), levels) - zero) * scale;
  }
  return x;
}

// The upper half of a number that was rounded to it, to even on a tie.
uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float in_bf16(float x) {
  const uint32_t bits = static_cast<uint32_t>(bf16_bits(x)) << 16;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// A weight matrix, its bias, and both packed, in any format.
struct Linear {
  int64_t n, k;
  Format format;
  double levels;
  Floats weight, bias, panels, scales;
  Linear(const gohsp::KernelTable& kernels, Random& random, int64_t n, int64_t k, Format format)
      : n(n),
        k(k),
        format(format),
        levels(static_cast<double>(kernels.activation_levels)),
        weight(random.normal(n * k, 1.0 / std::sqrt(k + 1.0))),
        bias(random.normal(n)) {
    if (format == Format::int8) {
      pack(kernels, in_int8().data());
    } else if (format == Format::bfloat16) {
      pack(kernels, in_bfloat16().data());
    } else {
      pack(kernels, weight.data());
    }
  }
  void pack(const gohsp::KernelTable& kernels, const void* values) {
    panels.resize(static_cast<size_t>(kernels.packed_bytes(format, n, k)) / sizeof(float));
    kernels.pack(format, {values, scales.data(), bias.data(), n, k}, panels.data());
  }
  // The weights as numbers of a format. They become rounded themselves, so that they are what the kernel reads.
  std::vector<int8_t> in_int8() {
    std::vector<int8_t> values;
    for (int64_t i = 0; i < n; ++i) {
      float largest = 0;
      for (int64_t j = 0; j < k; ++j) largest = std::max(largest, std::fabs(weight[i * k + j]));
      scales.push_back(largest / 127);
      for (int64_t j = 0; j < k; ++j) {
        values.push_back(static_cast<int8_t>(std::nearbyint(weight[i * k + j] / scales.back())));
        weight[i * k + j] = values.back() * scales.back();
      }
    }
    return values;
  }
  std::vector<uint16_t> in_bfloat16() {
    std::vector<uint16_t> values;
    for (float& w : weight) {
      values.push_back(bf16_bits(w));
      w = in_bf16(w);
    }
    return values;
  }
  Matrix matrix() const { return {panels.data(), n, k, format}; }
  std::vector<double> operator()(std::vector<double> x) const {
    std::vector<double> y(static_cast<size_t>(n));
    if (format == Format::int8) x = in_levels(x, levels);
    if (format == Format::bfloat16)
      for (double& v : x) v = in_bf16(static_cast<float>(v));
    for (int64_t i = 0; i < n; ++i) {
      y[i] = bias[i];
      for (int64_t j = 0; j < k; ++j) y[i] += weight[i * k + j] * x[j];
    }
    return y;
  }
};

double gelu(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

std::vector<double> normalised(const double* x, int64_t features, double eps, const Indices& kept) {
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < features; ++i) mean += x[i] / features;
  for (int64_t i = 0; i < features; ++i) variance += (x[i] - mean) * (x[i] - mean) / features;
  std::vector<double> y;
  for (int64_t i : kept) y.push_back((x[i] - mean) / std::sqrt(variance + eps));
  return y;
}

struct Sizes {
  int64_t batch, tokens, features, hidden;
  Indices qk, v;
  double keep;
  int64_t queries;
};

int64_t sum(const Indices& widths) {
  int64_t total = 0;
  for (int64_t w : widths) total += w;
  return total;
}

// One block (attention and MLP) with pruned columns, and the same by plain loops.
struct Block {
  const Sizes& s;
  Indices attention_in, attention_out, mlp_in, mlp_out;
  Linear q, k, v, proj, fc1, fc2;
  bool in_pairs;  // whether the factors of attention's products are rounded to bfloat16
  std::vector<Indices> plans;
  gohsp::Attention attention{};
  gohsp::Mlp mlp{};

  Block(const gohsp::KernelTable& kernels, Random& random, const Sizes& s, Format format)
      : s(s),
        attention_in(random.columns(s.features, s.keep)),
        attention_out(random.columns(s.features, s.keep)),
        mlp_in(random.columns(s.features, s.keep)),
        mlp_out(random.columns(s.features, s.keep)),
        q(kernels, random, sum(s.qk), size(attention_in), format),
        k(kernels, random, sum(s.qk), size(attention_in), format),
        v(kernels, random, sum(s.v), size(attention_in), format),
        proj(kernels, random, size(attention_out), sum(s.v), format),
        fc1(kernels, random, s.hidden, size(mlp_in), format),
        fc2(kernels, random, size(mlp_out), s.hidden, format),
        in_pairs(kernels.attends_in_pairs(format)) {
    attention = {q.matrix(),
                 k.matrix(),
                 v.matrix(),
                 proj.matrix(),
                 {size(s.qk), s.qk.data(), s.v.data(), nullptr, 0.0f, 1.0f},
                 columns(kernels, attention_in, Direction::gather),
                 columns(kernels, attention_out, Direction::scatter),
                 1e-6f};
    mlp = {fc1.matrix(),
           fc2.matrix(),
           columns(kernels, mlp_in, Direction::gather),
           columns(kernels, mlp_out, Direction::scatter),
           gohsp::Activation::gelu,
           1e-6f};
  }

  static int64_t size(const Indices& i) { return static_cast<int64_t>(i.size()); }
  // All columns are given without a plan, so that both ways are run.
  Columns columns(const gohsp::KernelTable& kernels, const Indices& kept, Direction direction) {
    if (size(kept) == s.features) return {s.features, nullptr};
    plans.emplace_back(static_cast<size_t>(kernels.plan_bytes(s.features)) / sizeof(int64_t));
    kernels.plan(kept.data(), size(kept), s.features, direction, plans.back().data());
    const Columns planned{size(kept), plans.back().data()};
    expect(kernels.plan_fits(planned, s.features), "a plan fits");
    expect(!kernels.plan_fits({size(kept) + 1, planned.plan}, s.features), "a plan of other columns does not fit");
    return planned;
  }

  void truth(std::vector<double>& x) const {
    const std::vector<double> before = x;
    for (int64_t b = 0; b < s.batch; ++b) {
      std::vector<std::vector<double>> qs, ks, vs;
      for (int64_t t = 0; t < s.tokens; ++t) {
        const auto n = normalised(&before[(b * s.tokens + t) * s.features], s.features, 1e-6, attention_in);
        qs.push_back(q(n));
        ks.push_back(k(n));
        vs.push_back(v(n));
      }
      for (int64_t t = 0; t < s.tokens; ++t) {
        double* row = &x[(b * s.tokens + t) * s.features];
        const auto y = proj(attend(qs[t], ks, vs));
        for (size_t i = 0; i < attention_out.size(); ++i) row[attention_out[i]] += y[i];
        auto h = fc1(normalised(row, s.features, 1e-6, mlp_in));
        for (double& a : h) a = gelu(a);
        const auto z = fc2(h);
        for (size_t i = 0; i < mlp_out.size(); ++i) row[mlp_out[i]] += z[i];
      }
    }
  }

  std::vector<double> attend(const std::vector<double>& query, const std::vector<std::vector<double>>& ks,
                             const std::vector<std::vector<double>>& vs) const {
    const auto factor = [&](double x) { return in_pairs ? in_bf16(static_cast<float>(x)) : x; };
    std::vector<double> out;
    int64_t qk_start = 0, v_start = 0;
    for (size_t h = 0; h < s.qk.size(); ++h) {
      std::vector<double> scores, weights;
      double total = 0;
      for (const auto& key : ks) {
        double score = 0;
        for (int64_t c = qk_start; c < qk_start + s.qk[h]; ++c) score += factor(query[c]) * factor(key[c]);
        scores.push_back(score);
      }
      const double top = *std::max_element(scores.begin(), scores.end());
      for (double score : scores) {
        weights.push_back(std::exp(score - top));
        total += weights.back();
      }
      for (int64_t c = v_start; c < v_start + s.v[h]; ++c) {
        double value = 0;
        for (size_t t = 0; t < vs.size(); ++t) value += factor(weights[t]) / total * factor(vs[t][c]);
        out.push_back(value);
      }
      qk_start += s.qk[h];
      v_start += s.v[h];
    }
    return out;
  }
};

void run_in_order(int64_t workers, void (*body)(void*, int64_t), void* context) {
  for (int64_t w = 0; w < workers; ++w) body(context, w);
}

void run_at_once(int64_t workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; ++w) threads.emplace_back(body, context, w);
  for (std::thread& t : threads) t.join();
}

std::string name_of(Format format) {
  return format == Format::float32 ? "float32" : format == Format::int8 ? "int8" : "bfloat16";
}

// `formats`: of the weights of three blocks.
void test_chain(const gohsp::KernelTable& kernels, const Sizes& s, const std::string& what,
                const std::vector<Format>& formats) {
  Random random{std::mt19937(7)};
  const Block first(kernels, random, s, formats[0]), second(kernels, random, s, formats[1]),
      third(kernels, random, s, formats[2]);
  // A value that lies between two integers may go to the other one here than in double.
  const double tolerance = formats[0] == Format::float32 ? 2e-6 : 2e-3;
  const gohsp::Sublayer layers[] = {{&first.attention, nullptr},  {nullptr, &first.mlp},
                                    {&second.attention, nullptr}, {nullptr, &second.mlp},
                                    {&third.attention, nullptr},  {nullptr, &third.mlp}};
  const Floats x = random.normal(s.batch * s.tokens * s.features);
  std::vector<double> all(x.begin(), x.end()), truth;
  for (const Block* block : {&first, &second, &third}) block->truth(all);
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto begin = all.begin() + b * s.tokens * s.features;
    truth.insert(truth.end(), begin, begin + s.queries * s.features);
  }
  const gohsp::Shape shape{s.batch, s.tokens, s.features, s.queries};
  for (int64_t workers : {1, 2, 5}) {
    for (auto run : {run_in_order, run_at_once}) {
      Floats y(truth.size(), std::nanf(""));
      kernels.sublayers(layers, 6, x.data(), y.data(), shape, {workers, run});
      expect_close(y, truth,
                   what + ", " + std::to_string(workers) + " workers " + (run == run_at_once ? "at once" : "in order"),
                   tolerance);
    }
  }
}

// One matrix over patches of `batch` images that are `down` x `across` patches large, behind `own` other tokens.
void test_embed(const gohsp::KernelTable& kernels, int64_t batch, int64_t down, int64_t across, int64_t own, int64_t n,
                const std::string& isa) {
  Random random{std::mt19937(5)};
  const gohsp::Patches p{3, 5 * down, 4 * across, 5, 4};
  const Linear linear(kernels, random, n, p.size(), Format::float32);
  const int64_t tokens = own + p.count();
  const Floats images = random.normal(batch * p.channels * p.height * p.width), base = random.normal(tokens * n);
  std::vector<double> truth;
  for (int64_t b = 0; b < batch; ++b) {
    truth.insert(truth.end(), base.begin(), base.begin() + own * n);
    for (int64_t q = 0; q < p.count(); ++q) {
      std::vector<double> pixels;
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t i = 0; i < 5; ++i)
          for (int64_t j = 0; j < 4; ++j)
            pixels.push_back(images[((b * 3 + c) * p.height + q / across * 5 + i) * p.width + q % across * 4 + j]);
      const auto row = linear(pixels);
      for (int64_t j = 0; j < n; ++j) truth.push_back(row[j] + base[(own + q) * n + j]);
    }
  }
  for (int64_t workers : {1, 2, 5}) {
    Floats y(truth.size(), std::nanf(""));
    kernels.embed(linear.matrix(), p, images.data(), batch, base.data(), tokens, y.data(), {workers, run_at_once});
    expect_close(y, truth, isa + "embedding of " + std::to_string(batch) + " x " + std::to_string(tokens));
  }
}

constexpr int64_t kMillisecond = 1000000;

void test_lost_time() {
  gohsp::LostTime lost_time;
  expect(lost_time.lost_until(1000) == 0, "nothing is held up before the first task");
  lost_time.begin_task(100);
  lost_time.end_task(110);
  lost_time.wait_until(120);
  expect(lost_time.lost_until(120) == 0, "a wait as long as a task is natural");
  lost_time.begin_task(120);
  lost_time.end_task(130);
  lost_time.wait_until(170);
  expect(lost_time.lost_until(170) == 30, "what exceeds it is lost");
  lost_time.begin_task(170);
  lost_time.end_task(180);
  expect(lost_time.lost_until(195) == 35, "the wait for the last ones counts as well");
}

// Calls of 100 milliseconds until all four workers are tried again.
int64_t calls_with_fewer(gohsp::WorkerThrottle& throttle) {
  int64_t calls = 0;
  for (; throttle.next_size(4) < 4; ++calls) throttle.report(100 * kMillisecond, 0);
  return calls;
}

void test_throttle() {
  gohsp::WorkerThrottle throttle;
  throttle.report(100 * kMillisecond, 12 * kMillisecond);
  expect(throttle.next_size(4) == 4, "less than an eighth is nobody's absence");
  throttle.report(100 * kMillisecond, 13 * kMillisecond);
  expect(throttle.next_size(4) == 3, "one worker is left out");
  expect(calls_with_fewer(throttle) == 1, "a single hiccup costs one call");
  for (int64_t calls : {2, 4, 8, 10, 10}) {
    throttle.report(100 * kMillisecond, 90 * kMillisecond);
    expect(calls_with_fewer(throttle) == calls, "each absence doubles the pause, up to the longest");
  }
  for (int64_t i = 0; i < 9; ++i) throttle.report(100 * kMillisecond, 0);
  throttle.report(100 * kMillisecond, 90 * kMillisecond);
  expect(calls_with_fewer(throttle) == 2, "calls without an absence shorten the pause by their time");
  throttle.report(100 * kMillisecond, 90 * kMillisecond);
  throttle.report(100 * kMillisecond, 90 * kMillisecond);
  expect(throttle.next_size(4) == 2, "two are left out where three were held up as well");
  expect(throttle.next_size(2) == 1 && throttle.next_size(1) == 1, "one is always left");
  throttle.report(2000 * kMillisecond, 0);
  expect(throttle.next_size(4) == 4, "a long call is a long pause");
}

void test_rounded_product(const gohsp::KernelTable& kernels, Format format, int64_t rows, int64_t n, int64_t k,
                          const std::string& isa) {
  Random random{std::mt19937(3)};
  const Linear linear(kernels, random, n, k, format);
  Floats x = random.normal(rows * k);
  for (int64_t j = 0; j < k && rows > 1; ++j) x[k + j] = 0;                            // a row of zeros
  for (int64_t j = 0; j < k && rows > 2; ++j) x[2 * k + j] = std::fabs(x[2 * k + j]);  // a one-sided row
  if (rows > 3 && k > 0) x[3 * k] = 1e4f;                                              // an outlier
  std::vector<double> truth;
  for (int64_t i = 0; i < rows; ++i)
    for (double v : linear({x.begin() + i * k, x.begin() + (i + 1) * k})) truth.push_back(v);
  Floats y(truth.size(), std::nanf(""));
  kernels.rounded_product(linear.matrix(), x.data(), rows, y.data());
  // Exact but for the scaling; without a fused multiply-add the product is rounded once more before it is an integer.
  expect_close(y, truth,
               isa + name_of(format) + " product of " + std::to_string(rows) + " x " + std::to_string(n) + " x " +
                   std::to_string(k),
               2e-4);
}

}  // namespace

int main() {
  test_lost_time();
  test_throttle();
  int tested = 0;
  for (const char* const* next = gohsp::instruction_sets(); *next != nullptr; ++next) {
    const char* name = *next;
    const gohsp::KernelTable* kernels = table(name);
    if (kernels == nullptr) continue;
    ++tested;
    const std::string isa = std::string(name) + ": ";
    test_embed(*kernels, 1, 14, 14, 1, 70, isa);
    test_embed(*kernels, 3, 2, 5, 0, 1, isa);
    test_embed(*kernels, 2, 1, 1, 3, 33, isa);
    test_embed(*kernels, 0, 3, 3, 1, 8, isa);
    constexpr auto kFp32 = Format::float32, kInt8 = Format::int8, kBf16 = Format::bfloat16;
    for (Format format : {kInt8, kBf16}) {
      for (int64_t k : {0, 1, 3, 4, 5, 64, 383})
        for (int64_t n : {1, 31, 100}) test_rounded_product(*kernels, format, 29, n, k, isa);
      test_rounded_product(*kernels, format, 0, 5, 7, isa);
      test_rounded_product(*kernels, format, 1, 40, 1536, isa);
    }
    for (const auto& formats :
         {std::vector{kFp32, kFp32, kFp32}, {kInt8, kInt8, kInt8}, {kBf16, kBf16, kBf16}, {kInt8, kFp32, kBf16}}) {
      const std::string in = isa + name_of(formats[0]) + ", " + name_of(formats[1]) + ", " + name_of(formats[2]) + ": ";
      test_chain(*kernels, {1, 50, 64, 100, {16, 16}, {16, 16}, 1.0, 50}, in + "nothing pruned", formats);
      test_chain(*kernels, {3, 37, 61, 45, {16, 0, 7}, {9, 5, 30}, 0.6, 37}, in + "ragged", formats);
      test_chain(*kernels, {9, 13, 40, 33, {4, 8}, {8, 0}, 0.5, 1}, in + "one query, more images than slots", formats);
      test_chain(*kernels, {2, 7, 24, 0, {}, {}, 0.5, 7}, in + "no head, no neuron", formats);
      test_chain(*kernels, {2, 7, 24, 16, {4}, {4}, 0.0, 7}, in + "no column", formats);
    }
    std::printf("%s done\n", name);
  }
  if (tested == 0) ++failures;
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
