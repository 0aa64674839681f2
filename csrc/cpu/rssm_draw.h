// From products to draws of latent and action on blocks of rows, and their derivatives. Formulas:
// fastrssm/reference/rssm_step.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/math.h"
#include "cpu/rssm_scan.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// c: [mean | raw] [M, 2S] without biases -> mean, std and the draw; raw is kept
template <typename T>
FASTRSSM_CLONES void gaussian(const T* c, const T* mean_bias, const T* raw_bias, const T* noise,
                              T min_std, bool split, T* mean, T* std, T* raw, T* stoch, Size M,
                              Size S) {
  for (Size m = 0; m < M; ++m) {
    const T *x = c + 2 * m * S, *eps = noise + m * S;
    T *to_mean = mean + m * S, *to_std = std + m * S, *to_raw = raw + m * S, *to = stoch + m * S;
    if (split) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) {
        to_mean[s] = x[s] + mean_bias[s];
        to_raw[s] = x[S + s] + raw_bias[s];
        to_std[s] = softplus_of(to_raw[s]) + min_std;
        to[s] = to_mean[s] + to_std[s] * eps[s];
      }
    } else {
#pragma omp simd
      for (Size s = 0; s < S; ++s) {
        to_mean[s] = x[s] + mean_bias[s];
        to_raw[s] = x[S + s] + raw_bias[s];
        to_std[s] = T(2) * sigmoid_of(T(0.5) * to_raw[s]) + min_std;
        to[s] = to_mean[s] + to_std[s] * eps[s];
      }
    }
  }
}

// d: [dmean | draw] [M, 2S] from the gradient of the draw and those of mean and std, if any
template <typename T>
FASTRSSM_CLONES void gaussian_backward(const T* grad, const T* mean_grad, const T* std_grad,
                                       const T* noise, const T* raw, bool split, T* d, Size M,
                                       Size S) {
  for (Size m = 0; m < M; ++m) {
    const T *g = grad + m * S, *eps = noise + m * S, *x = raw + m * S;
    T *dmean = d + 2 * m * S, *draw = dmean + S;
#pragma omp simd
    for (Size s = 0; s < S; ++s) {
      dmean[s] = g[s];
      draw[s] = g[s] * eps[s];
    }
    if (mean_grad) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) dmean[s] += mean_grad[m * S + s];
    }
    if (std_grad) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) draw[s] += std_grad[m * S + s];
    }
    if (split) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) draw[s] *= sigmoid_of(x[s]);
    } else {
#pragma omp simd
      for (Size s = 0; s < S; ++s) {
        const T half = sigmoid_of(T(0.5) * x[s]);
        draw[s] *= half * (T(1) - half);
      }
    }
  }
}

// The variables of a row side by side: class k of the line's variable i is lines[k * kAbreast + i].
// Rows have K classes of a variable together; `width` variables are there, zeros beyond.
template <typename T>
[[gnu::always_inline]] inline void load_classes(const T* row, Size width, Size K, T* lines) {
  for (Size k = 0; k < K; ++k) {
    T* line = lines + k * kAbreast;
    if (width == kAbreast) {
      for (Size i = 0; i < kAbreast; ++i) line[i] = row[i * K + k];
    } else {
      for (Size i = 0; i < kAbreast; ++i) line[i] = i < width ? row[i * K + k] : T(0);
    }
  }
}

// logits -> probabilities, uniform share included
template <typename T>
[[gnu::always_inline]] inline void softmax(T* lines, T unimix, Size K) {
  T top[kAbreast], scale[kAbreast] = {};
  for (Size i = 0; i < kAbreast; ++i) top[i] = lines[i];
  for (Size k = 1; k < K; ++k) {
    const T* line = lines + k * kAbreast;
#pragma omp simd
    for (Size i = 0; i < kAbreast; ++i) top[i] = line[i] > top[i] ? line[i] : top[i];
  }
  for (Size k = 0; k < K; ++k) {
    T* line = lines + k * kAbreast;
#pragma omp simd
    for (Size i = 0; i < kAbreast; ++i) {
      line[i] = exp_of(line[i] - top[i]);
      scale[i] += line[i];
    }
  }
#pragma omp simd
  for (Size i = 0; i < kAbreast; ++i) scale[i] = (T(1) - unimix) / scale[i];
  const T floor = unimix / static_cast<T>(K);
  for (Size k = 0; k < K; ++k) {
    T* line = lines + k * kAbreast;
#pragma omp simd
    for (Size i = 0; i < kAbreast; ++i) line[i] = line[i] * scale[i] + floor;
  }
}

// c: logits [M, S] without bias -> logits and a one-hot draw by the inverse of the distribution
template <typename T>
FASTRSSM_CLONES void categorical(const T* c, const T* bias, const T* noise, T unimix, T* logits,
                                 T* stoch, T* lines, Size M, Size S, Size groups) {
  const Size K = S / groups;
  for (Size m = 0; m < M; ++m) {
    const T* x = c + m * S;
    T *to_logits = logits + m * S, *to = stoch + m * S;
#pragma omp simd
    for (Size s = 0; s < S; ++s) {
      to_logits[s] = x[s] + bias[s];
      to[s] = T(0);
    }
    for (Size first = 0; first < groups; first += kAbreast) {
      const Size width = groups - first < kAbreast ? groups - first : kAbreast;
      load_classes(to_logits + first * K, width, K, lines);
      softmax(lines, unimix, K);
      T u[kAbreast] = {}, total[kAbreast] = {}, passed[kAbreast] = {};
      for (Size i = 0; i < width; ++i) u[i] = noise[m * groups + first + i];
      for (Size k = 0; k < K; ++k) {
        const T* line = lines + k * kAbreast;
#pragma omp simd
        for (Size i = 0; i < kAbreast; ++i) {
          total[i] += line[i];
          passed[i] += total[i] <= u[i] ? T(1) : T(0);
        }
      }
      for (Size i = 0; i < width; ++i) {
        T* one_hot = to + (first + i) * K;
        const Size index = static_cast<Size>(passed[i]);
        one_hot[index < K ? index : K - 1] = T(1);
        // no class is drawn where a probability is NaN
        if (total[i] != total[i]) {
          for (Size k = 0; k < K; ++k) one_hot[k] = total[i];
        }
      }
    }
  }
}

// d: gradient of the logits [M, S], straight through the draw, plus their own if any
template <typename T>
FASTRSSM_CLONES void categorical_backward(const T* grad, const T* logits_grad, const T* logits,
                                          T unimix, T* d, T* lines, Size M, Size S, Size groups) {
  const Size K = S / groups;
  T* grads = lines + K * kAbreast;
  for (Size m = 0; m < M; ++m) {
    for (Size first = 0; first < groups; first += kAbreast) {
      const Size width = groups - first < kAbreast ? groups - first : kAbreast,
                 at = m * S + first * K;
      load_classes(logits + at, width, K, lines);
      load_classes(grad + at, width, K, grads);
      softmax(lines, T(0), K);
      T dot[kAbreast] = {};
      for (Size k = 0; k < K; ++k) {
        const T *p = lines + k * kAbreast, *g = grads + k * kAbreast;
#pragma omp simd
        for (Size i = 0; i < kAbreast; ++i) dot[i] += p[i] * g[i];
      }
      for (Size k = 0; k < K; ++k) {
        const T *p = lines + k * kAbreast, *g = grads + k * kAbreast;
        for (Size i = 0; i < width; ++i) {
          d[at + i * K + k] = (T(1) - unimix) * p[i] * (g[i] - dot[i]);
        }
      }
    }
    if (logits_grad) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) d[m * S + s] += logits_grad[m * S + s];
    }
  }
}

// c: [mean | raw] [M, 2A] without biases -> a = tanh(mean + std noise), written with row distance
// ld
template <typename T>
FASTRSSM_CLONES void act(const T* c, const T* mean_bias, const T* raw_bias, const T* noise,
                         T min_std, T* raw, T* action, T* action_in, Size ld_in, Size M, Size A) {
  for (Size m = 0; m < M; ++m) {
    const T* x = c + 2 * m * A;
    for (Size a = 0; a < A; ++a) {
      const T r = x[A + a] + raw_bias[a];
      const T std = softplus_of(r) + min_std;
      raw[m * A + a] = r;
      action[m * A + a] = tanh_of(x[a] + mean_bias[a] + std * noise[m * A + a]);
      action_in[m * ld_in + a] = action[m * A + a];
    }
  }
}

// actions [M, A] beyond -1 and 1 come down to them; their factors have no gradient
template <typename T>
FASTRSSM_CLONES void bound_actions(const T* action, T* to, Size ld, Size M, Size A) {
  for (Size m = 0; m < M; ++m) {
    for (Size a = 0; a < A; ++a) {
      const T x = action[m * A + a], size = std::abs(x);
      to[m * ld + a] = size > T(1) ? x / size : x;
    }
  }
}
template <typename T>
FASTRSSM_CLONES void bound_actions_backward(const T* action, T* grad, Size ld, Size M, Size A) {
  for (Size m = 0; m < M; ++m) {
    for (Size a = 0; a < A; ++a) {
      const T size = std::abs(action[m * A + a]);
      if (size > T(1)) grad[m * ld + a] /= size;
    }
  }
}

// d: [dmean | draw] [M, 2A]
template <typename T>
FASTRSSM_CLONES void act_backward(const T* grad, Size ld_grad, const T* action_grad,
                                  const T* action, const T* noise, const T* raw, T* d, Size M,
                                  Size A) {
  for (Size m = 0; m < M; ++m) {
    for (Size a = 0; a < A; ++a) {
      const T y = action[m * A + a];
      const T g = grad[m * ld_grad + a] + (action_grad ? action_grad[m * A + a] : T(0));
      const T before = g * (T(1) - y * y);
      d[2 * m * A + a] = before;
      d[2 * m * A + A + a] = before * noise[m * A + a] * sigmoid_of(raw[m * A + a]);
    }
  }
}

}  // namespace
}  // namespace fastrssm::cpu
