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
  for (const char* const* name = gohsp::instruction_sets(); *name != nullptr; ++name)
    if (gohsp::kernels(*name) != nullptr) names.emplace_back(*name);
  return names;
}

gohsp::Format format_of(int64_t number) {
  if (number < 0 || number >= gohsp::kFormats) throw py::value_error("format: unknown number");
  return static_cast<gohsp::Format>(number);
}

// x W^T + b with packed weights, into an array that held NaN before. weight [n, k] has the numbers of its format.
Floats product(const std::string& capability, int64_t format, const Floats& x, const py::array& weight,
               const Floats& scales, const Floats& bias) {
  if (x.ndim() != 2 || weight.ndim() != 2 || x.shape(1) != weight.shape(1) || !(weight.flags() & py::array::c_style))
    throw py::value_error("x, weight: wanted [rows, k] and [n, k], contiguous");
  const int64_t n = weight.shape(0), k = weight.shape(1);
  if (bias.size() != n || scales.size() != n) throw py::value_error("scales, bias: wanted one for each output");
  const gohsp::KernelTable& kernels = table(capability);
  std::vector<int32_t> panels(kernels.packed_bytes(format_of(format), n, k) / sizeof(int32_t));
  kernels.pack(format_of(format), {weight.data(), scales.data(), bias.data(), n, k}, panels.data());
  Floats y({x.shape(0), weight.shape(0)});
  std::fill_n(y.mutable_data(), y.size(), std::numeric_limits<float>::quiet_NaN());
  kernels.rounded_product({panels.data(), n, k, format_of(format)}, x.data(), x.shape(0), y.mutable_data());
  return y;
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
  m.def("product", &product, py::arg("capability"), py::arg("format"), py::arg("x"), py::arg("weight"),
        py::arg("scales"), py::arg("bias"), "x W^T + b with rounded weights, into an array that held NaN before.");
  m.def("activate", &activate, py::arg("capability"), py::arg("activation"), py::arg("x"));
  m.def("exponential", &exponential, py::arg("capability"), py::arg("x"));
}
