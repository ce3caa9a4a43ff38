// SPDX-License-Identifier: Apache-2.0
// A window into the torch-free kernels for the Python tests: instruction sets one by one, accuracy of the functions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

const gohsp::KernelTable& table(const std::string& name) {
  const gohsp::KernelTable* found = gohsp::kernels(name.c_str());
  if (found == nullptr) throw py::value_error("capability: this build and this machine have no '" + name + "'");
  return *found;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const char* name : {"scalar", "avx2", "avx512", "avx512vnni", "amx", "neon"})
    if (gohsp::kernels(name) != nullptr) names.emplace_back(name);
  return names;
}

using Bytes = py::array_t<int8_t, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

// x W^T + b with packed weights, into an array that held NaN before.
Floats product(const gohsp::KernelTable& kernels, const Floats& x, const gohsp::Matrix& weight) {
  Floats y({x.shape(0), weight.n});
  std::fill_n(y.mutable_data(), y.size(), std::numeric_limits<float>::quiet_NaN());
  kernels.rounded_product(weight, x.data(), x.shape(0), y.mutable_data());
  return y;
}

void check_shapes(const Floats& x, const py::array& weight, const Floats& bias) {
  if (x.ndim() != 2 || weight.ndim() != 2 || x.shape(1) != weight.shape(1))
    throw py::value_error("x, weight: wanted [rows, k] and [n, k]");
  if (bias.size() != weight.shape(0)) throw py::value_error("bias: wanted one for each output");
}

Floats product_int8(const std::string& capability, const Floats& x, const Bytes& weight, const Floats& scales,
                    const Floats& bias) {
  check_shapes(x, weight, bias);
  const int64_t n = weight.shape(0), k = weight.shape(1);
  if (scales.size() != n) throw py::value_error("scales: wanted one for each output");
  const gohsp::KernelTable& kernels = table(capability);
  std::vector<int32_t> panels(kernels.packed_size_int8(n, k) / sizeof(int32_t));
  kernels.pack_int8(weight.data(), scales.data(), bias.data(), n, k, panels.data());
  return product(kernels, x, {panels.data(), n, k, gohsp::Weights::int8});
}

Floats product_bf16(const std::string& capability, const Floats& x, const Halves& weight, const Floats& bias) {
  check_shapes(x, weight, bias);
  const int64_t n = weight.shape(0), k = weight.shape(1);
  const gohsp::KernelTable& kernels = table(capability);
  std::vector<int32_t> panels(kernels.packed_size_bf16(n, k) / sizeof(int32_t));
  kernels.pack_bf16(weight.data(), bias.data(), n, k, panels.data());
  return product(kernels, x, {panels.data(), n, k, gohsp::Weights::bf16});
}

Floats activate(const std::string& capability, int64_t activation, const Floats& x) {
  if (activation < 0 || activation >= gohsp::kActivations) throw py::value_error("activation: unknown number");
  Floats y(x.size());
  table(capability).apply(static_cast<gohsp::Activation>(activation), x.data(), x.size(), y.mutable_data());
  return y;
}

Floats exponential(const std::string& capability, const Floats& x) {
  Floats y(x.size());
  table(capability).exponential(x.data(), x.size(), y.mutable_data());
  return y;
}

}  // namespace

PYBIND11_MODULE(_checks, m) {
  m.doc() = "The torch-free CPU kernels, for tests.";
  m.def("capabilities", &capabilities, "Instruction sets that this build and this machine have.");
  m.def("activation_levels", [](const std::string& capability) { return table(capability).activation_levels; });
  m.def("product_int8", &product_int8, py::arg("capability"), py::arg("x"), py::arg("weight"), py::arg("scales"),
        py::arg("bias"), "x W^T + b with activations and weights in 8 bits, into an array that held NaN before.");
  m.def("product_bf16", &product_bf16, py::arg("capability"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        "The same in bfloat16; weight is its bits.");
  m.def("activate", &activate, py::arg("capability"), py::arg("activation"), py::arg("x"));
  m.def("exponential", &exponential, py::arg("capability"), py::arg("x"));
}
