// The RSSM scans of fastrssm._native; see bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/acting.h"
#include "cpu/buffer.h"
#include "cpu/rssm_scan.h"

namespace py = pybind11;

namespace {

using fastrssm::cpu::Gemm, fastrssm::cpu::LayerOf, fastrssm::cpu::Precision,
    fastrssm::cpu::ScanLayout;
using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<std::int64_t>;

template <typename T>
T* at(const Addresses& addresses, std::size_t i) {
  return reinterpret_cast<T*>(addresses.at(i));
}

// Calls `run` with the products of torch's dtype.
template <typename Run>
auto with_gemm(const std::string& dtype, const std::string& precision, Run run) {
  const Precision chosen = fastrssm::cpu::precision_named(precision);
  if (dtype == "torch.float32") return run(fastrssm::cpu::choose_gemm<float>(chosen));
  if (dtype == "torch.float64") return run(fastrssm::cpu::choose_gemm<double>(chosen));
  throw py::type_error("dtype is " + dtype + ", expected torch.float32 or torch.float64");
}

// A layout whose tensors all exist: the scans trust it.
ScanLayout checked(const Sizes& values) {
  const ScanLayout layout(values);
  if (layout.head_layers < 2 || layout.policy_layers == 1) {
    throw py::value_error("layout has a network of one layer, expected a hidden one too");
  }
  return layout;
}

template <typename T>
std::vector<LayerOf<T>> layers(const Addresses& a) {
  std::vector<LayerOf<T>> out;
  for (std::size_t i = 0; i + 4 <= a.size(); i += 4) {
    out.push_back({at<T>(a, i), at<T>(a, i + 1), at<T>(a, i + 2), at<T>(a, i + 3)});
  }
  return out;
}

template <typename T>
fastrssm::cpu::ScanInputs<T> inputs_of(const Addresses& a) {
  return {at<const T>(a, 0),    at<const T>(a, 1), at<const T>(a, 2), at<const T>(a, 3),
          at<const bool>(a, 4), at<const T>(a, 5), at<const T>(a, 6), at<const T>(a, 7)};
}

template <typename T>
fastrssm::cpu::ScanOutputs<T> outputs_of(const Addresses& a) {
  return {at<T>(a, 0), at<T>(a, 1), at<T>(a, 2), at<T>(a, 3), at<T>(a, 4), at<T>(a, 5)};
}

fastrssm::cpu::ScanConstants constants_of(const std::vector<double>& c) {
  return {c.at(0), c.at(1), c.at(2)};
}

template <typename T>
T zero_of(const Gemm<T>&) {
  return {};
}

void pack(int threads, const std::string& dtype, const std::string& precision, const Sizes& sizes,
          const Addresses& weights, bool transposed, std::uintptr_t packed) {
  const ScanLayout layout = checked(sizes);
  with_gemm(dtype, precision, [&](const auto& gemm) {
    using T = decltype(zero_of(gemm));
    const auto from = layers<const T>(weights);
    py::gil_scoped_release release;
    fastrssm::cpu::scan_pack<T>(gemm, layout, from, transposed, reinterpret_cast<char*>(packed),
                                threads);
  });
}

void forward(int threads, const std::string& dtype, const std::string& precision,
             const Sizes& sizes, const std::vector<double>& constants, const Addresses& inputs,
             const Addresses& weights, std::uintptr_t packed, const Addresses& outputs) {
  const ScanLayout layout = checked(sizes);
  with_gemm(dtype, precision, [&](const auto& gemm) {
    using T = decltype(zero_of(gemm));
    const auto in = inputs_of<T>(inputs);
    const auto out = outputs_of<T>(outputs);
    const auto from = layers<const T>(weights);
    const auto numbers = constants_of(constants);
    py::gil_scoped_release release;
    fastrssm::cpu::scan_forward<T>(gemm, layout, numbers, in, from,
                                   reinterpret_cast<const char*>(packed), out, threads);
  });
}

void backward(int threads, const std::string& dtype, const std::string& precision,
              const Sizes& sizes, const std::vector<double>& constants, const Addresses& inputs,
              const Addresses& weights, std::uintptr_t packed_transposed, const Addresses& outputs,
              const Addresses& output_grads, const Addresses& input_grads,
              const Addresses& weight_grads) {
  const ScanLayout layout = checked(sizes);
  with_gemm(dtype, precision, [&](const auto& gemm) {
    using T = decltype(zero_of(gemm));
    const auto in = inputs_of<T>(inputs);
    const auto out = outputs_of<T>(outputs);
    const auto from = layers<const T>(weights);
    const auto numbers = constants_of(constants);
    const fastrssm::cpu::ScanOutputGrads<T> grads{
        at<const T>(output_grads, 0), at<const T>(output_grads, 1), at<const T>(output_grads, 2),
        at<const T>(output_grads, 3), at<const T>(output_grads, 4)};
    const fastrssm::cpu::ScanInputGrads<T> to{at<T>(input_grads, 0), at<T>(input_grads, 1),
                                              at<T>(input_grads, 2), at<T>(input_grads, 3),
                                              at<T>(input_grads, 4)};
    const auto to_weights = layers<T>(weight_grads);
    py::gil_scoped_release release;
    fastrssm::cpu::scan_backward<T>(gemm, layout, numbers, in, from,
                                    reinterpret_cast<const char*>(packed_transposed), out, grads,
                                    to, to_weights, threads);
  });
}

void define_acting(py::module_& m) {
  using fastrssm::cpu::PackedNet, fastrssm::cpu::RssmStep;
  const auto gemm_of = [](const std::string& precision) -> const Gemm<float>& {
    return fastrssm::cpu::choose_gemm<float>(fastrssm::cpu::precision_named(precision));
  };
  py::class_<PackedNet>(m, "PackedNet", "A float32 network with ELU between its layers.")
      .def(py::init([gemm_of](const std::string& precision, std::int64_t in_size,
                              const Sizes& out_sizes, const Addresses& weights,
                              const Addresses& biases) {
             std::vector<fastrssm::cpu::AffineLayer> layers;
             std::int64_t in = in_size;
             for (std::size_t l = 0; l < out_sizes.size(); in = out_sizes[l++]) {
               layers.push_back(
                   {at<const float>(weights, l), in, at<const float>(biases, l), out_sizes[l]});
             }
             return std::make_unique<PackedNet>(gemm_of(precision), in_size, std::move(layers));
           }),
           py::arg("precision"), py::arg("in_size"), py::arg("out_sizes"), py::arg("weights"),
           py::arg("biases"))
      .def(
          "run",
          [](const PackedNet& net, int threads, std::int64_t B, std::uintptr_t x,
             std::uintptr_t y) {
            const py::gil_scoped_release release;
            net.run(reinterpret_cast<const float*>(x), B, reinterpret_cast<float*>(y), threads);
          },
          py::arg("threads"), py::arg("B"), py::arg("x"), py::arg("y"));
  py::class_<RssmStep>(m, "RssmStep", "One step of rssm_observe of float32 rows, for acting.")
      .def(py::init([gemm_of](const std::string& precision, const Sizes& layout,
                              const std::vector<double>& constants, const Addresses& weights,
                              std::uintptr_t packed, std::uintptr_t embed_weight,
                              std::int64_t embed_ld, std::int64_t embed_size,
                              std::uintptr_t embed_bias) {
             const ScanLayout sizes = checked(layout);
             return std::make_unique<RssmStep>(
                 gemm_of(precision), sizes, constants_of(constants), layers<const float>(weights),
                 reinterpret_cast<const char*>(packed), embed_size,
                 fastrssm::cpu::AffineLayer{reinterpret_cast<const float*>(embed_weight), embed_ld,
                                            reinterpret_cast<const float*>(embed_bias),
                                            sizes.head_hidden()});
           }),
           py::arg("precision"), py::arg("layout"), py::arg("constants"), py::arg("weights"),
           py::arg("packed"), py::arg("embed_weight"), py::arg("embed_ld"), py::arg("embed_size"),
           py::arg("embed_bias"))
      .def(
          "run",
          [](const RssmStep& step, int threads, std::int64_t B, std::uintptr_t embed,
             std::uintptr_t action, std::uintptr_t noise, std::uintptr_t is_first,
             std::uintptr_t deter, std::uintptr_t stoch, std::uintptr_t next_deter,
             std::uintptr_t next_stoch) {
            const auto from = [](std::uintptr_t address) {
              return reinterpret_cast<const float*>(address);
            };
            const py::gil_scoped_release release;
            step.run({from(embed), from(action), from(noise),
                      reinterpret_cast<const bool*>(is_first), from(deter), from(stoch)},
                     B, reinterpret_cast<float*>(next_deter), reinterpret_cast<float*>(next_stoch),
                     threads);
          },
          py::arg("threads"), py::arg("B"), py::arg("embed"), py::arg("action"), py::arg("noise"),
          py::arg("is_first"), py::arg("deter"), py::arg("stoch"), py::arg("next_deter"),
          py::arg("next_stoch"));
}

}  // namespace

void define_rssm_scan(py::module_& m) {
  using fastrssm::cpu::Buffer;
  py::class_<Buffer>(m, "Memory", py::buffer_protocol(),
                     "Memory that goes back to a small pool when the last view of it is gone.")
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) {
        return py::buffer_info(static_cast<unsigned char*>(buffer.data()),
                               static_cast<py::ssize_t>(buffer.bytes()));
      });
  m.def(
      "rssm_scan_saved_numel",
      [](const Sizes& layout) { return fastrssm::cpu::scan_saved_numel(checked(layout)); },
      py::arg("layout"));
  m.def(
      "rssm_scan_packed_bytes",
      [](const std::string& dtype, const std::string& precision, const Sizes& layout,
         bool transposed) {
        return with_gemm(dtype, precision, [&](const auto& gemm) {
          return fastrssm::cpu::scan_packed_bytes(gemm, checked(layout), transposed);
        });
      },
      py::arg("dtype"), py::arg("precision"), py::arg("layout"), py::arg("transposed"));
  m.def("rssm_scan_pack", &pack, py::arg("threads"), py::arg("dtype"), py::arg("precision"),
        py::arg("layout"), py::arg("weights"), py::arg("transposed"), py::arg("packed"));
  m.def("rssm_scan_forward", &forward, py::arg("threads"), py::arg("dtype"), py::arg("precision"),
        py::arg("layout"), py::arg("constants"), py::arg("inputs"), py::arg("weights"),
        py::arg("packed"), py::arg("outputs"));
  m.def("rssm_scan_backward", &backward, py::arg("threads"), py::arg("dtype"), py::arg("precision"),
        py::arg("layout"), py::arg("constants"), py::arg("inputs"), py::arg("weights"),
        py::arg("packed_transposed"), py::arg("outputs"), py::arg("output_grads"),
        py::arg("input_grads"), py::arg("weight_grads"));
  define_acting(m);
}
