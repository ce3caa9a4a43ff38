// SPDX-License-Identifier: Apache-2.0
// A window into the torch-free kernels for the Python tests: instruction sets one by one, accuracy of the functions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
  for (const char* name : {"scalar", "avx2", "avx512", "neon"})
    if (gohsp::kernels(name) != nullptr) names.emplace_back(name);
  return names;
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
  m.def("activate", &activate, py::arg("capability"), py::arg("activation"), py::arg("x"));
  m.def("exponential", &exponential, py::arg("capability"), py::arg("x"));
}
