// Definitions of the cluster scans; built where there is a CUDA compiler.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Layout = std::vector<std::int64_t>;
using Addresses = std::vector<Address>;

void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("cuda: ") + fastrssm_cuda_error(error));
}

// T, B and the numbers of ops.rssm_plan.Plan.structure before those of the layers
constexpr std::size_t kLayoutNumbers = 18;

void check(const Layout& layout) {
  if (layout.size() == kLayoutNumbers) return;
  throw std::invalid_argument("layout has " + std::to_string(layout.size()) +
                              " numbers, expected 18");
}

std::string refusal(const Layout& layout, bool backward, int ranks, int rows) {
  check(layout);
  std::int64_t sizes[3];
  const char* why = fastrssm_cluster_sizes(layout.data(), backward, ranks, rows, sizes);
  return why ? why : "";
}

std::vector<std::int64_t> sizes(const Layout& layout, bool backward, int ranks, int rows) {
  check(layout);
  std::vector<std::int64_t> found(3);
  fastrssm_cluster_sizes(layout.data(), backward, ranks, rows, found.data());
  return found;
}

int count(int device, const Layout& layout, bool backward, int ranks, int rows) {
  check(layout);
  int found = 0;
  check(fastrssm_cluster_count(device, layout.data(), backward, ranks, rows, &found));
  return found;
}

void pack(Address stream, const Layout& layout, bool backward, int ranks, int rows,
          const Addresses& layers, Address packed) {
  check(layout);
  check(fastrssm_cluster_pack(layout.data(), backward, ranks, rows, layers.data(),
                              static_cast<int>(layers.size() / 4), reinterpret_cast<void*>(packed),
                              reinterpret_cast<void*>(stream)));
}

// the addresses of a launch before those of the layers: rssm_launch.h
constexpr int kBeforeLayers = 24;

void run(Address stream, const Layout& layout, bool backward, int ranks, int rows, int clusters,
         const std::array<double, 3>& constants, bool learns, const Addresses& tensors) {
  check(layout);
  const int layers = (static_cast<int>(tensors.size()) - kBeforeLayers) / 4;
  check(fastrssm_cluster_run(layout.data(), backward, ranks, rows, clusters, constants.data(),
                             learns, tensors.data(), layers, reinterpret_cast<void*>(stream)));
}

}  // namespace

void define_rssm_cluster(py::module_& m) {
  m.def("rssm_cluster_refusal", &refusal, py::arg("layout"), py::arg("backward"), py::arg("ranks"),
        py::arg("rows"), "Why a cluster cannot hold a scan; empty when it can.");
  m.def("rssm_cluster_sizes", &sizes, py::arg("layout"), py::arg("backward"), py::arg("ranks"),
        py::arg("rows"), "Bytes of packed weights, numbers a row kept, and of gradients.");
  m.def("rssm_cluster_count", &count, py::arg("device"), py::arg("layout"), py::arg("backward"),
        py::arg("ranks"), py::arg("rows"), "How many clusters the device runs at once.");
  m.def("rssm_cluster_pack", &pack, py::arg("stream"), py::arg("layout"), py::arg("backward"),
        py::arg("ranks"), py::arg("rows"), py::arg("layers"), py::arg("packed"));
  m.def("rssm_cluster_run", &run, py::arg("stream"), py::arg("layout"), py::arg("backward"),
        py::arg("ranks"), py::arg("rows"), py::arg("clusters"), py::arg("constants"),
        py::arg("learns"), py::arg("tensors"));
}
