// The C interface of the emulation, for tests/ops/cluster_emulation.py.
#include <memory>
#include <string>

#include "cuda/rssm_backward.h"
#include "cuda/rssm_emulated_warp.h"
#include "cuda/rssm_forward.h"
#include "cuda/rssm_launch.h"

namespace fastrssm::cluster {
namespace {

template <template <class, int> class Scan, int kRowTiles>
std::string emulate(const Program& p, const Pointers& g, int clusters, int order, int seed,
                    Mutation mutation, int which) {
  for (int i = 0; i < clusters; ++i) {
    Cluster cluster(p, i, clusters, order, seed + i, mutation, which);
    cluster.run([&](Fiber& fiber) {
      Machine machine(cluster, fiber);
      Scan<Machine, kRowTiles>(machine, p, g).run();
    });
    if (!cluster.error.empty()) return cluster.error;
  }
  return "";
}

}  // namespace
}  // namespace fastrssm::cluster

using namespace fastrssm::cluster;

#define FASTRSSM_EXPORT extern "C" __attribute__((visibility("default")))

// Sizes of a scan: packed bytes, kept and gradient numbers a row, bytes of shared memory, barriers.
// Returns why there is none, or null.
FASTRSSM_EXPORT const char* emulator_sizes(const std::int64_t* layout, int backward, int ranks,
                                           int rows, std::int64_t* found) {
  auto p = std::make_unique<Program>();
  const Sizes sizes = sizes_of(layout);
  const char* why = (backward ? make_backward : make_forward)(sizes, ranks, rows, p.get());
  found[0] = static_cast<std::int64_t>(p->tiles) * ranks * kTileBytes;
  found[1] = kept_width(sizes);
  found[2] = p->gradients;
  found[3] = p->shared;
  found[4] = p->barriers;
  return why;
}

FASTRSSM_EXPORT const char* emulator_pack(const std::int64_t* layout, int backward, int ranks,
                                          int rows, const std::uintptr_t* tensors, int layers,
                                          std::uintptr_t packed) {
  auto p = std::make_unique<Program>();
  const char* why =
      (backward ? make_backward : make_forward)(sizes_of(layout), ranks, rows, p.get());
  if (why) return why;
  LayerWeights weights;
  for (int l = 0; l < layers; ++l)
    weights.weight[l] = reinterpret_cast<const float*>(tensors[4 * l]);
  const std::int64_t items = static_cast<std::int64_t>(p->tiles) * ranks * kWarp;
  for (std::int64_t i = 0; i < items; ++i) {
    pack_lane(*p, weights, i, reinterpret_cast<unsigned char*>(packed));
  }
  return nullptr;
}

// Runs a scan; `options`: backward, ranks, rows, clusters, order, seed, mutation, which barrier,
// and whether the world model learns. Returns what went wrong, or an empty string.
FASTRSSM_EXPORT const char* emulator_run(const std::int64_t* layout, const int* options,
                                         const double* constants, const std::uintptr_t* tensors,
                                         int layers) {
  static std::string error;
  auto p = std::make_unique<Program>();
  const int backward = options[0], ranks = options[1], rows = options[2];
  const char* why =
      (backward ? make_backward : make_forward)(sizes_of(layout), ranks, rows, p.get());
  if (why) return why;
  const Pointers g = pointers_of(tensors, layers, constants, options[8] != 0);
  const auto go = [&](auto scan) {
    return scan(*p, g, options[3], options[4], options[5], static_cast<Mutation>(options[6]),
                options[7]);
  };
  if (backward) {
    error = rows == 8 ? go(emulate<Backward, 1>) : go(emulate<Backward, 2>);
  } else {
    error = rows == 8 ? go(emulate<Forward, 1>) : go(emulate<Forward, 2>);
  }
  return error.c_str();
}

// The scalar formulas on arrays of n numbers: r_sum, z_sum, xn, hn, before, grad in; r, z, n, hn,
// h, then gradients of r_sum, z_sum, xn, hn and before out.
FASTRSSM_EXPORT void emulator_cell(int n, const float* in, float* out) {
  for (int i = 0; i < n; ++i) {
    const auto at = [&](int k) { return in[k * n + i]; };
    const Gates g = cell_forward(at(0), at(1), at(2), at(3), at(4));
    const GateGrads d = cell_backward(at(5), g.r, g.z, g.n, g.hn, at(4));
    const float found[] = {g.r, g.z, g.n, g.hn, g.h, d.r, d.z, d.xn, d.hn, d.before};
    for (int k = 0; k < 10; ++k) out[k * n + i] = found[k];
  }
}

// The same of block_gru: r_sum, c_sum, u_sum, before, grad in; h, then gradients of all but the
// last out.
FASTRSSM_EXPORT void emulator_block_cell(int n, const float* in, float* out) {
  for (int i = 0; i < n; ++i) {
    const auto at = [&](int k) { return in[k * n + i]; };
    const Gates g = block_forward(at(0), at(1), at(2) - 1.0f, at(3));
    const GateGrads d = block_backward(at(4), g.r, g.z, g.n, g.hn, at(3));
    const float found[] = {g.h, d.r, d.hn, d.z, d.before};
    for (int k = 0; k < 5; ++k) out[k * n + i] = found[k];
  }
}

// The same of the cells with a norm: y of three gates, before, grad in; h, then gradients of y and
// before out.
FASTRSSM_EXPORT void emulator_norm_cell(int n, const float* in, float update_first, float* out) {
  for (int i = 0; i < n; ++i) {
    const float y[] = {in[i], in[n + i], in[2 * n + i]}, before = in[3 * n + i];
    float dy[3];
    const bool first = update_first != 0.0f;
    const float d = norm_backward(in[4 * n + i], y, first, before, dy);
    const float found[] = {norm_forward(y, first, before).h, dy[0], dy[1], dy[2], d};
    for (int k = 0; k < 5; ++k) out[k * n + i] = found[k];
  }
}

// elu, silu, tanh, std of split and of joint heads, and the derivatives of all but tanh.
FASTRSSM_EXPORT void emulator_activations(int n, const float* x, float min_std, float* out) {
  for (int i = 0; i < n; ++i) {
    const float found[] = {elu(x[i]),
                           silu(x[i]),
                           quick_tanh(x[i]),
                           std_of(x[i], true, min_std),
                           std_of(x[i], false, min_std),
                           elu_slope(elu(x[i])),
                           silu_slope(x[i]),
                           std_slope(x[i], true),
                           std_slope(x[i], false)};
    for (int k = 0; k < 9; ++k) out[k * n + i] = found[k];
  }
}
