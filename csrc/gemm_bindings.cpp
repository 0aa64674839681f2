// The packed products of fastrssm._native, for tests and benchmarks, and the networks made of them;
// see bindings.cpp. The scans call the products from C++.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/mlp.h"

namespace py = pybind11;

namespace {

using namespace fastrssm::cpu;
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls `run` with the products of torch's dtype.
template <typename Run>
auto with_gemm(const std::string& dtype, const std::string& precision, const std::string& isa,
               Run run) {
  const Precision chosen = precision_named(precision);
  const Isa set = isa_named(isa);
  if (!has_isa(set)) throw std::runtime_error("isa is '" + isa + "', which this processor lacks");
  if (dtype == "torch.float32") return run(choose_gemm<float>(chosen, set), float{});
  if (dtype == "torch.float64") return run(choose_gemm<double>(chosen, set), double{});
  throw py::type_error("dtype is " + dtype + ", expected torch.float32 or torch.float64");
}

template <typename Run>
auto with_gemm(const std::string& dtype, const std::string& precision, Run run) {
  return with_gemm(dtype, precision, kIsaNames[static_cast<int>(best_isa())], run);
}

template <typename T>
std::vector<MlpLayer<T>> layers(const Addresses& a) {
  std::vector<MlpLayer<T>> out;
  for (std::size_t i = 0; i + 4 <= a.size(); i += 4) {
    out.push_back({at<T>(a[i]), at<T>(a[i + 1]), at<T>(a[i + 2]), at<T>(a[i + 3])});
  }
  return out;
}

void run_mlp_forward(int threads, const std::string& dtype, const std::string& precision,
                     const std::vector<Size>& layout, Address x, const Addresses& weights,
                     Address results, Address saved) {
  with_gemm(dtype, precision, [&](const auto& gemm, auto zero) {
    using T = decltype(zero);
    const MlpLayout sizes(layout);
    const auto from = layers<const T>(weights);
    py::gil_scoped_release release;
    mlp_forward<T>(gemm, sizes, at<const T>(x), from, at<T>(results), at<T>(saved), threads);
  });
}

void run_mlp_backward(int threads, const std::string& dtype, const std::string& precision,
                      const std::vector<Size>& layout, Address x, const Addresses& weights,
                      Address results, Address saved, Address grad, Address x_grad,
                      const Addresses& weight_grads) {
  with_gemm(dtype, precision, [&](const auto& gemm, auto zero) {
    using T = decltype(zero);
    const MlpLayout sizes(layout);
    const auto from = layers<const T>(weights);
    const auto to = layers<T>(weight_grads);
    py::gil_scoped_release release;
    mlp_backward<T>(gemm, sizes, at<const T>(x), from, at<const T>(results), at<const T>(saved),
                    at<const T>(grad), at<T>(x_grad), to, threads);
  });
}

template <typename T>
OuterProducts<T> one_product(const T* dy, Size ldy, Size N, const T* x, Size ldx, Size K, T* dw,
                             Size ldw) {
  return {{{dy, ldy, N}}, {{x, ldx, K}}, {{dw, ldw}}};
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const char* name : kIsaNames) {
    if (has_isa(isa_named(name))) names.emplace_back(name);
  }
  return names;
}

}  // namespace

void define_gemm(py::module_& m) {
  m.def(
      "gemm_isa", [] { return kIsaNames[static_cast<int>(best_isa())]; },
      "The instruction set that the scans use; FASTRSSM_ISA lowers it.");
  m.def("gemm_isas", &isas, "Instruction sets whose products run on this processor.");
  m.def(
      "gemm_bytes",
      [](const std::string& dtype, const std::string& precision, const std::string& isa, Size M,
         Size N, Size K, int threads) {
        return with_gemm(dtype, precision, isa, [&](const auto& gemm, auto zero) {
          using T = decltype(zero);
          return std::tuple(
              weight_bytes(gemm, N, K), row_bytes(gemm, M, K),
              outer_product_bytes(gemm, one_product<T>(nullptr, N, N, nullptr, K, K, nullptr, K),
                                  threads));
        });
      },
      "Memory of packed weights [N, K], packed rows [M, K] and add_outer_products.",
      py::arg("dtype"), py::arg("precision"), py::arg("isa"), py::arg("M"), py::arg("N"),
      py::arg("K"), py::arg("threads"));
  m.def(
      "gemm_pack_weights",
      [](const std::string& dtype, const std::string& precision, const std::string& isa, Address w,
         Size stride_n, Size stride_k, Size N, Size K, Address packed) {
        with_gemm(dtype, precision, isa, [&](const auto& gemm, auto zero) {
          using T = decltype(zero);
          pack_weights(gemm, at<const T>(w), stride_n, stride_k, N, K, at<void>(packed));
        });
      },
      py::arg("dtype"), py::arg("precision"), py::arg("isa"), py::arg("w"), py::arg("stride_n"),
      py::arg("stride_k"), py::arg("N"), py::arg("K"), py::arg("packed"));
  m.def(
      "gemm_multiply",
      [](const std::string& dtype, const std::string& precision, const std::string& isa,
         Address first, Size first_ld, Size first_K, Address second, Size second_ld, Size second_K,
         Address rows, Address weights, Size M, Size N, Address c, Size ldc, bool accumulate) {
        with_gemm(dtype, precision, isa, [&](const auto& gemm, auto zero) {
          using T = decltype(zero);
          const Columns<T> one{at<const T>(first), first_ld, first_K};
          const Columns<T> two{at<const T>(second), second_ld, second_K};
          pack_rows(gemm, one, two, M, at<void>(rows));
          multiply(gemm, at<void>(rows), at<void>(weights), M, N, first_K + second_K, at<T>(c), ldc,
                   accumulate);
        });
      },
      "c = or += [first | second] W^T, rows packed into `rows` before.", py::arg("dtype"),
      py::arg("precision"), py::arg("isa"), py::arg("first"), py::arg("first_ld"),
      py::arg("first_K"), py::arg("second"), py::arg("second_ld"), py::arg("second_K"),
      py::arg("rows"), py::arg("weights"), py::arg("M"), py::arg("N"), py::arg("c"), py::arg("ldc"),
      py::arg("accumulate"));
  m.def(
      "gemm_add_outer_products",
      [](const std::string& dtype, const std::string& precision, const std::string& isa, Address dy,
         Size ldy, Address x, Size ldx, Size R, Size N, Size K, Address dw, Size ldw,
         Address workspace, int threads) {
        with_gemm(dtype, precision, isa, [&](const auto& gemm, auto zero) {
          using T = decltype(zero);
          const auto product =
              one_product<T>(at<const T>(dy), ldy, N, at<const T>(x), ldx, K, at<T>(dw), ldw);
          add_outer_products(gemm, product, R, at<void>(workspace), threads);
        });
      },
      py::arg("dtype"), py::arg("precision"), py::arg("isa"), py::arg("dy"), py::arg("ldy"),
      py::arg("x"), py::arg("ldx"), py::arg("R"), py::arg("N"), py::arg("K"), py::arg("dw"),
      py::arg("ldw"), py::arg("workspace"), py::arg("threads"));
  m.def(
      "mlp_saved_numel",
      [](const std::vector<Size>& layout) { return mlp_saved_numel(MlpLayout(layout)); },
      py::arg("layout"));
  m.def("mlp_forward", &run_mlp_forward, py::arg("threads"), py::arg("dtype"), py::arg("precision"),
        py::arg("layout"), py::arg("x"), py::arg("weights"), py::arg("results"), py::arg("saved"));
  m.def("mlp_backward", &run_mlp_backward, py::arg("threads"), py::arg("dtype"),
        py::arg("precision"), py::arg("layout"), py::arg("x"), py::arg("weights"),
        py::arg("results"), py::arg("saved"), py::arg("grad"), py::arg("x_grad"),
        py::arg("weight_grads"));
}
