// SPDX-License-Identifier: Apache-2.0
// The module _checks_cuda, for the Python tests: loading it registers the emulated operators for tensors on the CPU
// (csrc/torch/cuda_ops.cpp is linked in). Beside that it holds the emulation's own tests: kernels with planted faults,
// and bare fragments.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../launch.cuh"
#include "../operands.cuh"
#include "../probe.h"

namespace py = pybind11;

namespace gohsp::cuda {
namespace {

struct Memory {
  float* in;   // [64]
  float* out;  // [64]
};

using Kernel = void (*)(const Memory&);

void store_own() { store_shared(thread_index() * 4, 1.0f + static_cast<float>(thread_index())); }

// --- what must be found; the tests read the lines that the comments mark ---------------------------------------------
void missing_barrier(const Memory& m) {
  store_shared(thread_index() * 4, 1.0f);                         // race: first
  const float x = load_shared<float>((thread_index() ^ 32) * 4);  // race: second
  store_global(m.out + thread_index(), x);
}

void missing_second_barrier(const Memory&) {
  store_own();
  barrier();
  const float x = load_shared<float>((thread_index() ^ 32) * 4);  // overwritten: first
  store_shared(thread_index() * 4, x);                            // overwritten: second
}

void missing_warp_barrier(const Memory&) {
  store_own();
  load_shared<float>((thread_index() ^ 1) * 4);
}

void warp_barrier_between_warps(const Memory&) {
  store_own();
  warp_barrier();
  load_shared<float>((thread_index() ^ 32) * 4);
}

void read_before_write(const Memory&) { load_shared<float>(thread_index() * 4); }

void outside_shared_memory(const Memory&) { store_shared(thread_index() * 4 + 1024, 1.0f); }

void misaligned_shared_memory(const Memory&) { store_shared(thread_index() * 8 + 2, 1.0f); }

void outside_tensor(const Memory& m) { load_global(m.in + thread_index() + 1); }

void misaligned_tensor(const Memory& m) { load_global(reinterpret_cast<const Bytes16*>(m.in + 1)); }

void barrier_that_some_skip(const Memory&) {
  if (thread_index() < 40) barrier();
}

void two_barriers(const Memory&) {
  if (thread_index() < 32)
    barrier();  // apart: first
  else
    barrier();  // apart: second
}

void shuffle_without_some_lanes(const Memory&) {
  if (thread_index() % 32 < 31) shuffle_xor(1.0f, 1);
}

void copy_without_wait(const Memory& m) {
  copy_async(thread_index() * 16, m.in, true);
  commit();
  load_shared<float>(thread_index() * 16);
}

void wait_for_too_few(const Memory& m) {
  copy_async(thread_index() * 16, m.in, true);
  commit();
  wait_copies<1>();
  load_shared<float>(thread_index() * 16);
}

void copy_seen_by_another_thread(const Memory& m) {
  copy_async(thread_index() * 16, m.in, true);
  commit();
  wait_copies<0>();
  load_shared<float>((thread_index() ^ 1) * 16);
}

void copy_over_what_is_read(const Memory& m) {
  store_own();
  barrier();
  load_shared<float>(252 - thread_index() * 4);
  if (thread_index() < 16) copy_async(thread_index() * 16, m.in, true);
}

void two_writers(const Memory& m) { store_global(m.out + thread_index(), 1.0f); }

void reads_what_another_block_wrote(const Memory& m) {
  if (block_index() == 0) store_global(m.out + thread_index(), 1.0f);
  if (block_index() == 1) load_global(m.out + thread_index());
}

void rows_in_the_same_banks(const Memory&) {
  const int lane = thread_index() % 32;
  if (thread_index() < 32)
    for (int i = 0; i < 4; ++i) store_shared(lane * 32 + i * 4, 0.0f);
  barrier();
  uint32_t to[4];
  load_matrices(to, lane * 32);  // rows r and r + 4 of a matrix
}

// --- what must not be ------------------------------------------------------------------------------------------------
void correct(const Memory& m) {
  for (int round = 0; round < 3; ++round) {
    store_own();
    warp_barrier();
    const float neighbour = load_shared<float>((thread_index() ^ 1) * 4);
    barrier();
    const float other = load_shared<float>((thread_index() ^ 32) * 4);
    barrier();
    if (thread_index() < 16) copy_async(thread_index() * 16, m.in + 4 * thread_index(), thread_index() % 2 == 0);
    commit();
    wait_copies<0>();
    barrier();
    const float copied = load_shared<float>(thread_index() * 4);
    const float sum = sum_of_warp(neighbour + other);
    barrier();
    if (block_index() == 0 && round == 2) store_global(m.out + thread_index(), copied + sum);
  }
}

const std::map<std::string, Kernel> kKernels = {
    {"missing_barrier", missing_barrier},
    {"missing_second_barrier", missing_second_barrier},
    {"missing_warp_barrier", missing_warp_barrier},
    {"warp_barrier_between_warps", warp_barrier_between_warps},
    {"read_before_write", read_before_write},
    {"outside_shared_memory", outside_shared_memory},
    {"misaligned_shared_memory", misaligned_shared_memory},
    {"outside_tensor", outside_tensor},
    {"misaligned_tensor", misaligned_tensor},
    {"barrier_that_some_skip", barrier_that_some_skip},
    {"two_barriers", two_barriers},
    {"shuffle_without_some_lanes", shuffle_without_some_lanes},
    {"copy_without_wait", copy_without_wait},
    {"wait_for_too_few", wait_for_too_few},
    {"copy_seen_by_another_thread", copy_seen_by_another_thread},
    {"copy_over_what_is_read", copy_over_what_is_read},
    {"two_writers", two_writers},
    {"reads_what_another_block_wrote", reads_what_another_block_wrote},
    {"rows_in_the_same_banks", rows_in_the_same_banks},
    {"correct", correct},
};

// Runs one of the kernels above in two blocks of 64 threads with 1 KiB; returns its output. Throws what was found.
std::array<float, 64> run_kernel(const std::string& name) {
  std::array<float, 64> in, out{};
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  const Memory memory{in.data(), out.data()};
  const Kernel kernel = kKernels.at(name);
  emulate::forget();
  emulate::allow(in.data(), sizeof in);
  emulate::allow(out.data(), sizeof out);
  emulate::launch(2, 64, 1024, false, [&] { kernel(memory); });
  return out;
}

using Registers = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// d = a b for fragments given register by register: a [32, 4], b [32, 2], d [32, 4] by lane.
py::array_t<float> multiply(const std::string& precision, const Registers& a, const Registers& b) {
  py::array_t<float> d({32, 4});
  float* to = d.mutable_data();
  const uint32_t *left = a.data(), *right = b.data();
  emulate::launch(1, 32, 0, false, [&] {
    const int lane = thread_index();
    float mine[4] = {};
    const uint32_t* l = left + 4 * lane;
    const uint32_t* r = right + 2 * lane;
    if (precision == "f16") F16::multiply(mine, l, r[0], r[1]);
    if (precision == "bf16") Bf16::multiply(mine, l, r[0], r[1]);
    if (precision == "tf32") Tf32::multiply(mine, l, r[0], r[1]);
    if (precision == "f32") F32::multiply(mine, l, r[0], r[1]);
    std::copy(mine, mine + 4, to + 4 * lane);
  });
  return d;
}

// The registers [32, 4] of an ldmatrix of 32 rows [32, 4 words].
py::array_t<uint32_t> load(const Registers& rows, bool transposed) {
  py::array_t<uint32_t> registers({32, 4});
  uint32_t* to = registers.mutable_data();
  const uint32_t* from = rows.data();
  emulate::launch(1, 32, 512, false, [&] {
    const int lane = thread_index();
    for (int i = 0; i < 4; ++i) store_shared(lane * 16 + i * 4, from[4 * lane + i]);
    warp_barrier();
    uint32_t mine[4];
    transposed ? load_matrices_transposed(mine, lane * 16) : load_matrices(mine, lane * 16);
    std::copy(mine, mine + 4, to + 4 * lane);
  });
  return registers;
}

template <class T>
std::vector<float> round_trip(const std::vector<float>& x) {
  std::vector<float> y;
  for (float v : x) y.push_back(to_float(from_float<T>(v)));
  return y;
}

std::vector<float> round_to(const std::string& precision, const std::vector<float>& x) {
  if (precision == "f16") return round_trip<Half>(x);
  if (precision == "bf16") return round_trip<Bfloat16>(x);
  std::vector<float> y;
  for (float v : x) y.push_back(float_of(to_tf32(v)));
  return y;
}

}  // namespace
}  // namespace gohsp::cuda

PYBIND11_MODULE(_checks_cuda, m) {
  using namespace gohsp::cuda;
  m.doc() = "The CUDA kernels in emulation, for tests.";
  py::register_exception<emulate::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("run_kernel", &run_kernel, py::arg("name"));
  m.def("multiply", &multiply, py::arg("precision"), py::arg("a"), py::arg("b"));
  m.def("load_matrices", &load, py::arg("rows"), py::arg("transposed"));
  m.def("round_to", &round_to, py::arg("precision"), py::arg("x"));
  m.def(
      "bank_conflicts", [] { return std::exchange(emulate::bank_conflicts, 0); },
      "Matrices read by ldmatrix with conflicts since the last call.");
  m.def(
      "launched", [] { return emulate::launched; }, "Threads and shared bytes of a block, by kernel launched so far.");
  m.def(
      "reached", [] { return std::exchange(emulate::reached, {}); },
      "Launches since the last call, by kernel and by what it was given.");
  m.def(
      "only_note", [](bool noted) { return std::exchange(emulate::only_noted, noted); }, py::arg("noted"),
      "Sets whether launches are noted and do nothing; returns what was set before.");
  m.def("reason_of", &reason_of, py::arg("driver"), py::arg("runtime"), py::arg("error"));
  m.def(
      "pretend_processors",
      [](int64_t count) {
        std::swap(count, emulate::pretended_processors);
        return count;
      },
      py::arg("count"), "Sets the number of multiprocessors that the choice of tiles goes by; returns the last.");
  m.def(
      "largest_tile", [](int rows) { return std::exchange(emulate::largest_tile, rows); }, py::arg("rows"),
      "Sets the rows of the largest tile of a linear layer, 0 for the choice of a GPU; returns what was set before.");
  m.def(
      "pretend_capability", [](int major) { return std::exchange(emulate::pretended_capability, major); },
      py::arg("major"), "Sets the major number of the GPU's compute capability; returns what was set before.");
}
