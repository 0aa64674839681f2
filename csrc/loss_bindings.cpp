// The small ops of fastrssm._native that losses are made of; see bindings.cpp.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/number.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls `run` with a zero of the C++ type that torch's dtype names, without the GIL.
template <typename Run>
void with_type(const std::string& dtype, Run run) {
  py::gil_scoped_release release;
  if (dtype == "torch.float32") return run(float{});
  if (dtype == "torch.float64") return run(double{});
  if (dtype == "torch.bfloat16") return run(fastrssm::BFloat16{});
  throw py::type_error("dtype is " + dtype +
                       ", expected torch.float32, torch.float64 or torch.bfloat16");
}

void define_categorical_kl(py::module_& m) {
  m.def(
      "categorical_kl_forward",
      [](int threads, const std::string& dtype, Size N, Size G, Size K, Address post_logits,
         Address prior_logits, Address kl, Address statistics, double unimix) {
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          using A = fastrssm::ComputeOf<T>;
          fastrssm::cpu::categorical_kl_forward(at<const T>(post_logits), at<const T>(prior_logits),
                                                at<A>(kl), at<A>(statistics), N, G, K, unimix,
                                                threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("G"), py::arg("K"),
      py::arg("post_logits"), py::arg("prior_logits"), py::arg("kl"), py::arg("statistics"),
      py::arg("unimix"));
  m.def(
      "categorical_kl_backward",
      [](int threads, const std::string& dtype, Size N, Size G, Size K, Address grad,
         Address post_logits, Address prior_logits, Address kl, Address statistics,
         Address post_grad, Address prior_grad, double unimix, double post_scale,
         double prior_scale, double free_nats) {
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          using A = fastrssm::ComputeOf<T>;
          fastrssm::cpu::categorical_kl_backward(
              at<const A>(grad), at<const T>(post_logits), at<const T>(prior_logits),
              at<const A>(kl), at<const A>(statistics), at<T>(post_grad), at<T>(prior_grad), N, G,
              K, unimix, post_scale, prior_scale, free_nats, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("G"), py::arg("K"),
      py::arg("grad"), py::arg("post_logits"), py::arg("prior_logits"), py::arg("kl"),
      py::arg("statistics"), py::arg("post_grad"), py::arg("prior_grad"), py::arg("unimix"),
      py::arg("post_scale"), py::arg("prior_scale"), py::arg("free_nats"));
}

void define_gaussian_nll(py::module_& m) {
  m.def(
      "gaussian_nll_forward",
      [](int threads, const std::string& dtype, Size N, Size S, Size mask_width, Address target,
         Address mean, Address std, Address mask, Address nll, double constant,
         bool weight_by_std) {
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          fastrssm::cpu::gaussian_nll_forward(
              at<const T>(target), at<const T>(mean), at<const T>(std), at<const T>(mask),
              at<fastrssm::ComputeOf<T>>(nll), N, S, mask_width, constant, weight_by_std, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("mask_width"),
      py::arg("target"), py::arg("mean"), py::arg("std"), py::arg("mask"), py::arg("nll"),
      py::arg("constant"), py::arg("weight_by_std"));
  m.def(
      "gaussian_nll_backward",
      [](int threads, const std::string& dtype, Size N, Size S, Size mask_width, Address grad,
         Address target, Address mean, Address std, Address mask, Address mean_grad,
         Address std_grad, bool weight_by_std) {
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          fastrssm::cpu::gaussian_nll_backward(
              at<const fastrssm::ComputeOf<T>>(grad), at<const T>(target), at<const T>(mean),
              at<const T>(std), at<const T>(mask), at<T>(mean_grad), at<T>(std_grad), N, S,
              mask_width, weight_by_std, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("mask_width"),
      py::arg("grad"), py::arg("target"), py::arg("mean"), py::arg("std"), py::arg("mask"),
      py::arg("mean_grad"), py::arg("std_grad"), py::arg("weight_by_std"));
}

void define_lambda_return(py::module_& m) {
  m.def(
      "lambda_return_forward",
      [](int threads, const std::string& dtype, Size N, Size T, Size B, Address rewards,
         Address next_values, Address discounts, Address returns, double discount, double lambda) {
        with_type(dtype, [&](auto zero) {
          using E = decltype(zero);
          fastrssm::cpu::lambda_return_forward(
              at<const E>(rewards), at<const E>(next_values), at<const E>(discounts),
              at<fastrssm::ComputeOf<E>>(returns), N, T, B, discount, lambda, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("T"), py::arg("B"),
      py::arg("rewards"), py::arg("next_values"), py::arg("discounts"), py::arg("returns"),
      py::arg("discount"), py::arg("lambda_"));
  m.def(
      "lambda_return_backward",
      [](int threads, const std::string& dtype, Size N, Size T, Size B, Address grad,
         Address returns, Address next_values, Address discounts, Address rewards_grad,
         Address values_grad, Address discounts_grad, double discount, double lambda) {
        with_type(dtype, [&](auto zero) {
          using E = decltype(zero);
          using A = fastrssm::ComputeOf<E>;
          fastrssm::cpu::lambda_return_backward(
              at<const A>(grad), at<const A>(returns), at<const E>(next_values),
              at<const E>(discounts), at<E>(rewards_grad), at<E>(values_grad),
              at<E>(discounts_grad), N, T, B, discount, lambda, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("T"), py::arg("B"),
      py::arg("grad"), py::arg("returns"), py::arg("next_values"), py::arg("discounts"),
      py::arg("rewards_grad"), py::arg("values_grad"), py::arg("discounts_grad"),
      py::arg("discount"), py::arg("lambda_"));
}

}  // namespace

void define_losses(py::module_& m) {
  define_categorical_kl(m);
  define_gaussian_nll(m);
  define_lambda_return(m);
}
