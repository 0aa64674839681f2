// Every definition of the module fastrssm._native. Tensors come as addresses: making numpy views of
// the ten of a backward cost more than all the rest of the call (13 us of 60). The ops in
// fastrssm.ops check shape, dtype, device and contiguity before they call.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/number.h"
#include "cpu/ops.h"
#ifdef FASTRSSM_HAS_CUDA
#include "cuda/ops.h"
#endif

namespace py = pybind11;

void define_gemm(py::module_& m);       // gemm_bindings.cpp
void define_losses(py::module_& m);     // loss_bindings.cpp
void define_rssm_scan(py::module_& m);  // scan_bindings.cpp
#ifdef FASTRSSM_HAS_CUDA
void define_rssm_cluster(py::module_& m);  // cluster_bindings.cpp
#endif

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls `run` with a zero of the C++ type that torch's dtype names.
template <typename Run>
void with_type(const std::string& dtype, Run run) {
  if (dtype == "torch.float32") return run(float{});
  if (dtype == "torch.float64") return run(double{});
  if (dtype == "torch.bfloat16") return run(fastrssm::BFloat16{});
  throw py::type_error("dtype is " + dtype +
                       ", expected torch.float32, torch.float64 or torch.bfloat16");
}

void define_gaussian_kl(py::module_& m) {
  m.def(
      "gaussian_kl_forward",
      [](int threads, const std::string& dtype, std::int64_t N, std::int64_t S, Address post_mean,
         Address post_std, Address prior_mean, Address prior_std, Address kl) {
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          py::gil_scoped_release release;
          fastrssm::cpu::gaussian_kl_forward(at<const T>(post_mean), at<const T>(post_std),
                                             at<const T>(prior_mean), at<const T>(prior_std),
                                             at<fastrssm::ComputeOf<T>>(kl), N, S, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("post_mean"),
      py::arg("post_std"), py::arg("prior_mean"), py::arg("prior_std"), py::arg("kl"));
  m.def(
      "gaussian_kl_backward",
      [](int threads, const std::string& dtype, std::int64_t N, std::int64_t S, Address grad,
         Address kl, Address post_mean, Address post_std, Address prior_mean, Address prior_std,
         Address post_mean_grad, Address post_std_grad, Address prior_mean_grad,
         Address prior_std_grad, double post_scale, double prior_scale, double free_nats) {
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          using A = fastrssm::ComputeOf<T>;
          py::gil_scoped_release release;
          fastrssm::cpu::gaussian_kl_backward(
              at<const A>(grad), at<const A>(kl), at<const T>(post_mean), at<const T>(post_std),
              at<const T>(prior_mean), at<const T>(prior_std), at<T>(post_mean_grad),
              at<T>(post_std_grad), at<T>(prior_mean_grad), at<T>(prior_std_grad), N, S, post_scale,
              prior_scale, free_nats, threads);
        });
      },
      py::arg("threads"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("grad"),
      py::arg("kl"), py::arg("post_mean"), py::arg("post_std"), py::arg("prior_mean"),
      py::arg("prior_std"), py::arg("post_mean_grad"), py::arg("post_std_grad"),
      py::arg("prior_mean_grad"), py::arg("prior_std_grad"), py::arg("post_scale"),
      py::arg("prior_scale"), py::arg("free_nats"));
}

#ifdef FASTRSSM_HAS_CUDA

int stored(const std::string& dtype) {
  if (dtype == "torch.float32") return fastrssm::kFloat32;
  if (dtype == "torch.bfloat16") return fastrssm::kBFloat16;
  throw py::type_error("dtype is " + dtype + ", expected torch.float32 or torch.bfloat16");
}

void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("cuda: ") + fastrssm_cuda_error(error));
}

void define_gaussian_kl_cuda(py::module_& m) {
  m.def(
      "gaussian_kl_forward_cuda",
      [](Address stream, const std::string& dtype, std::int64_t N, std::int64_t S,
         Address post_mean, Address post_std, Address prior_mean, Address prior_std, Address kl) {
        check(fastrssm_gaussian_kl_forward(stored(dtype), at<void>(post_mean), at<void>(post_std),
                                           at<void>(prior_mean), at<void>(prior_std), at<float>(kl),
                                           N, S, at<void>(stream)));
      },
      py::arg("stream"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("post_mean"),
      py::arg("post_std"), py::arg("prior_mean"), py::arg("prior_std"), py::arg("kl"));
  m.def(
      "gaussian_kl_backward_cuda",
      [](Address stream, const std::string& dtype, std::int64_t N, std::int64_t S, Address grad,
         Address kl, Address post_mean, Address post_std, Address prior_mean, Address prior_std,
         Address post_mean_grad, Address post_std_grad, Address prior_mean_grad,
         Address prior_std_grad, float post_scale, float prior_scale, float free_nats) {
        check(fastrssm_gaussian_kl_backward(
            stored(dtype), at<float>(grad), at<float>(kl), at<void>(post_mean), at<void>(post_std),
            at<void>(prior_mean), at<void>(prior_std), at<void>(post_mean_grad),
            at<void>(post_std_grad), at<void>(prior_mean_grad), at<void>(prior_std_grad), N, S,
            post_scale, prior_scale, free_nats, at<void>(stream)));
      },
      py::arg("stream"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("grad"),
      py::arg("kl"), py::arg("post_mean"), py::arg("post_std"), py::arg("prior_mean"),
      py::arg("prior_std"), py::arg("post_mean_grad"), py::arg("post_std_grad"),
      py::arg("prior_mean_grad"), py::arg("prior_std_grad"), py::arg("post_scale"),
      py::arg("prior_scale"), py::arg("free_nats"));
}

#endif  // FASTRSSM_HAS_CUDA

std::string cuda_status() {
#ifdef FASTRSSM_HAS_CUDA
  const int error = fastrssm_cuda_probe();
  return error == 0 ? "" : fastrssm_cuda_error(error);
#else
  return "built without CUDA";
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels. They trust their arguments; the ops in fastrssm.ops check them.";
  define_gaussian_kl(m);
  define_gemm(m);
  define_losses(m);
  define_rssm_scan(m);
#ifdef FASTRSSM_HAS_CUDA
  define_gaussian_kl_cuda(m);
  define_rssm_cluster(m);
#endif
  m.def("cuda_status", &cuda_status, "Empty when CUDA kernels can run, else the reason why not.");
}
