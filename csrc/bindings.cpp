// Every definition of the module fastrssm._native. Sizes are checked and the GIL is released here;
// a wrong dtype or a strided array is a TypeError, never a silent copy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/number.h"
#include "cpu/ops.h"
#ifdef FASTRSSM_HAS_CUDA
#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace {

using fastrssm::BFloat16;
using fastrssm::ComputeOf;

// numpy has no bfloat16: it arrives as uint16
template <typename T>
using Array = py::array_t<std::conditional_t<std::is_same_v<T, BFloat16>, std::uint16_t, T>,
                          py::array::c_style>;

py::arg in(const char* name) { return py::arg(name).noconvert(); }

template <typename T>
const T* read(const Array<T>& array, std::int64_t size, const char* name) {
  if (array.size() != size) {
    throw py::value_error(std::string(name) + " has " + std::to_string(array.size()) +
                          " elements, expected " + std::to_string(size));
  }
  return reinterpret_cast<const T*>(array.data());
}

template <typename T>
T* write(Array<T>& array, std::int64_t size, const char* name) {
  read<T>(array, size, name);
  return reinterpret_cast<T*>(array.mutable_data());
}

std::int64_t last_size(const py::array& array, const char* name) {
  if (array.ndim() == 0) throw py::value_error(std::string(name) + " has no dimension");
  return array.shape(array.ndim() - 1);
}

template <typename T>
void define_gaussian_kl(py::module_& m) {
  m.def(
      "gaussian_kl_forward",
      [](const Array<T>& post_mean, const Array<T>& post_std, const Array<T>& prior_mean,
         const Array<T>& prior_std, Array<ComputeOf<T>> kl, int threads) {
        const std::int64_t N = kl.size(), S = last_size(post_mean, "post_mean");
        const T* pm = read<T>(post_mean, N * S, "post_mean");
        const T* ps = read<T>(post_std, N * S, "post_std");
        const T* qm = read<T>(prior_mean, N * S, "prior_mean");
        const T* qs = read<T>(prior_std, N * S, "prior_std");
        auto* out = write<ComputeOf<T>>(kl, N, "kl");
        py::gil_scoped_release release;
        fastrssm::cpu::gaussian_kl_forward<T>(pm, ps, qm, qs, out, N, S, threads);
      },
      in("post_mean"), in("post_std"), in("prior_mean"), in("prior_std"), in("kl"),
      py::arg("threads"));
  m.def(
      "gaussian_kl_backward",
      [](const Array<ComputeOf<T>>& grad, const Array<ComputeOf<T>>& kl, const Array<T>& post_mean,
         const Array<T>& post_std, const Array<T>& prior_mean, const Array<T>& prior_std,
         Array<T> post_mean_grad, Array<T> post_std_grad, Array<T> prior_mean_grad,
         Array<T> prior_std_grad, double post_scale, double prior_scale, double free_nats,
         int threads) {
        const std::int64_t N = kl.size(), S = last_size(post_mean, "post_mean");
        const auto* g = read<ComputeOf<T>>(grad, N, "grad");
        const auto* value = read<ComputeOf<T>>(kl, N, "kl");
        const T* pm = read<T>(post_mean, N * S, "post_mean");
        const T* ps = read<T>(post_std, N * S, "post_std");
        const T* qm = read<T>(prior_mean, N * S, "prior_mean");
        const T* qs = read<T>(prior_std, N * S, "prior_std");
        T* pm_grad = write<T>(post_mean_grad, N * S, "post_mean_grad");
        T* ps_grad = write<T>(post_std_grad, N * S, "post_std_grad");
        T* qm_grad = write<T>(prior_mean_grad, N * S, "prior_mean_grad");
        T* qs_grad = write<T>(prior_std_grad, N * S, "prior_std_grad");
        py::gil_scoped_release release;
        fastrssm::cpu::gaussian_kl_backward<T>(g, value, pm, ps, qm, qs, pm_grad, ps_grad, qm_grad,
                                               qs_grad, N, S, post_scale, prior_scale, free_nats,
                                               threads);
      },
      in("grad"), in("kl"), in("post_mean"), in("post_std"), in("prior_mean"), in("prior_std"),
      in("post_mean_grad"), in("post_std_grad"), in("prior_mean_grad"), in("prior_std_grad"),
      py::arg("post_scale"), py::arg("prior_scale"), py::arg("free_nats"), py::arg("threads"));
}

#ifdef FASTRSSM_HAS_CUDA

void* at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }
float* floats_at(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

// as torch spells them
int stored(const std::string& dtype) {
  if (dtype == "torch.float32") return fastrssm::kFloat32;
  if (dtype == "torch.bfloat16") return fastrssm::kBFloat16;
  throw py::type_error("dtype is " + dtype + ", expected torch.float32 or torch.bfloat16");
}

void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("cuda: ") + fastrssm_cuda_error(error));
}

void define_gaussian_kl_cuda(py::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "gaussian_kl_forward_cuda",
      [](Address stream, const std::string& dtype, std::int64_t N, std::int64_t S,
         Address post_mean, Address post_std, Address prior_mean, Address prior_std, Address kl) {
        check(fastrssm_gaussian_kl_forward(stored(dtype), at(post_mean), at(post_std),
                                           at(prior_mean), at(prior_std), floats_at(kl), N, S,
                                           at(stream)));
      },
      py::arg("stream"), py::arg("dtype"), py::arg("N"), py::arg("S"), py::arg("post_mean"),
      py::arg("post_std"), py::arg("prior_mean"), py::arg("prior_std"), py::arg("kl"));
  m.def(
      "gaussian_kl_backward_cuda",
      [](Address stream, const std::string& dtype, std::int64_t N, std::int64_t S, Address grad,
         Address kl, Address post_mean, Address post_std, Address prior_mean, Address prior_std,
         Address post_mean_grad, Address post_std_grad, Address prior_mean_grad,
         Address prior_std_grad, float post_scale, float prior_scale, float free_nats) {
        check(fastrssm_gaussian_kl_backward(stored(dtype), floats_at(grad), floats_at(kl),
                                            at(post_mean), at(post_std), at(prior_mean),
                                            at(prior_std), at(post_mean_grad), at(post_std_grad),
                                            at(prior_mean_grad), at(prior_std_grad), N, S,
                                            post_scale, prior_scale, free_nats, at(stream)));
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
  m.doc() = "Compiled kernels of fastrssm. The ops in fastrssm.ops check what they pass here.";
  define_gaussian_kl<float>(m);
  define_gaussian_kl<double>(m);
  define_gaussian_kl<BFloat16>(m);
#ifdef FASTRSSM_HAS_CUDA
  define_gaussian_kl_cuda(m);
#endif
  m.def("cuda_status", &cuda_status, "Empty when CUDA kernels can run, else the reason why not.");
}
