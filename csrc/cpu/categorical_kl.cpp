#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/math.h"
#include "common/number.h"
#include "cpu/ops.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

// also for lambdas; what is not inlined is not compiled for the processor at hand
#define FASTRSSM_INLINE __attribute__((always_inline))

namespace fastrssm::cpu {
namespace {

// One line of lanes for each of kLanes variables.
template <typename A>
using Lines = A[kLanes][kLanes];

// What is found of kLanes variables: the statistics of ops.h, and the KL.
template <typename A>
struct Found {
  A statistics[kStatistics][kLanes], kl[kLanes];
};

constexpr std::int64_t whole_lines(std::int64_t K) { return (K + kLanes - 1) / kLanes * kLanes; }

// What a sum begins with: adding to minus zero is no addition.
template <typename A>
constexpr A kNothing = -A(0);

// Lines that are handled at once; kClasses is K where that is known at compile time, else 0.
template <int kClasses>
constexpr int kLines = std::max(1, kClasses / kLanes);

// Calls run(full, k) for the classes from k on that fit in kLines lines; `full` if all of them
// exist.
template <int kClasses, typename Run>
FASTRSSM_INLINE inline void for_lines(std::int64_t K, Run run) {
  if constexpr (kClasses > 0) {
    run(std::true_type(), std::int64_t{0});
  } else {
    std::int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) run(std::true_type(), k);
    if (k < K) run(std::false_type(), k);
  }
}

template <int kClasses, typename T, typename A>
FASTRSSM_INLINE inline void largest(const T* logits, std::int64_t K, A (&found)[kLanes]) {
  constexpr A kLeast = -std::numeric_limits<A>::infinity();
  std::fill_n(found, kLanes, kLeast);
  for_lines<kClasses>(K, [&](auto full, std::int64_t first) FASTRSSM_INLINE {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      A most = found[i];
#pragma GCC unroll 4
      for (int line = 0; line < kLines<kClasses>; ++line) {
        const std::int64_t k = first + line * kLanes + i;
        const A x = full || k < K ? widen(logits[k]) : kLeast;
        most = x > most ? x : most;
      }
      found[i] = most;
    }
  });
}

// Sums the exponentials of logits less the largest, and the differences of those logits weighted by
// the exponentials of the posterior. Keeps the exponentials, of whole lines, unless post_exp is
// null.
template <int kClasses, typename T, typename A>
FASTRSSM_INLINE inline void add_exponentials(const T* post, const T* prior, std::int64_t K,
                                             A post_largest, A prior_largest, A* post_exp,
                                             A* prior_exp, A (&post_sum)[kLanes],
                                             A (&prior_sum)[kLanes], A (&difference)[kLanes]) {
  // its exponential is zero
  constexpr A kPadding = -1e4;
  std::fill_n(post_sum, kLanes, kNothing<A>);
  std::fill_n(prior_sum, kLanes, kNothing<A>);
  std::fill_n(difference, kLanes, kNothing<A>);
  for_lines<kClasses>(K, [&](auto full, std::int64_t first) FASTRSSM_INLINE {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      A u = kNothing<A>, v = kNothing<A>, d = kNothing<A>;
#pragma GCC unroll 4
      for (int line = 0; line < kLines<kClasses>; ++line) {
        const std::int64_t k = first + line * kLanes + i;
        const A a = full || k < K ? widen(post[k]) - post_largest : kPadding;
        const A b = full || k < K ? widen(prior[k]) - prior_largest : kPadding;
        const A exp_a = exp_of_difference(a), exp_b = exp_of_difference(b);
        u += exp_a;
        v += exp_b;
        d += exp_a * (a - b);
        if (post_exp != nullptr) {
          post_exp[k] = exp_a;
          prior_exp[k] = exp_b;
        }
      }
      post_sum[i] += u;
      prior_sum[i] += v;
      difference[i] += d;
    }
  });
}

// Sums over the mixtures q and p, exponentials times a share plus a uniform probability:
// q log(q / p), exp_q log(q / p) and exp_p q / p. Of padding q and p are equal.
template <int kClasses, typename A>
FASTRSSM_INLINE inline void add_mixtures(const A* post_exp, const A* prior_exp, std::int64_t K,
                                         A post_share, A prior_share, A uniform, A (&kl)[kLanes],
                                         A (&log_ratio)[kLanes], A (&ratio)[kLanes]) {
  std::fill_n(kl, kLanes, kNothing<A>);
  std::fill_n(log_ratio, kLanes, kNothing<A>);
  std::fill_n(ratio, kLanes, kNothing<A>);
  for_lines<kClasses>(K, [&](auto, std::int64_t first) FASTRSSM_INLINE {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      A u = kNothing<A>, v = kNothing<A>, w = kNothing<A>;
#pragma GCC unroll 4
      for (int line = 0; line < kLines<kClasses>; ++line) {
        const std::int64_t k = first + line * kLanes + i;
        const A q = post_share * post_exp[k] + uniform, p = prior_share * prior_exp[k] + uniform;
        const A quotient = q / p, log_quotient = log_of_ratio(quotient);
        u += q * log_quotient;
        v += post_exp[k] * log_quotient;
        w += prior_exp[k] * quotient;
      }
      kl[i] += u;
      log_ratio[i] += v;
      ratio[i] += w;
    }
  });
}

// Asks for the logits of the variable that lies two passes ahead: in the pass that has most to
// compute, for the one that only reads.
template <typename T>
FASTRSSM_INLINE inline void prefetch(const T* logits, std::int64_t K) {
  constexpr std::int64_t kCacheLine = 64 / sizeof(T);
  const T* from = logits + 2 * kLanes * K;
  for (std::int64_t k = 0; k < K; k += kCacheLine) __builtin_prefetch(from + k);
}

// The KL of `count` variables, at most kLanes, step by step: those of one would wait for each
// other.
template <int kClasses, typename T, typename A>
FASTRSSM_INLINE inline void find(const T* post, const T* prior, std::int64_t count, std::int64_t K,
                                 A unimix, Lines<A> (&lines)[3], Found<A>& found) {
  auto& [post_largest, prior_largest, post_scale, prior_scale, log_ratio, ratio] = found.statistics;
  auto& [one, two, three] = lines;
  for (std::int64_t g = 0; g < count; ++g) {
    largest<kClasses>(post + g * K, K, one[g]);
    largest<kClasses>(prior + g * K, K, two[g]);
  }
  join_lanes(one, post_largest, Larger());
  join_lanes(two, prior_largest, Larger());
  A prior_sum[kLanes];
  if (unimix > A(0)) {
    const A share = A(1) - unimix, uniform = unimix / A(K);
    const std::int64_t width = whole_lines(K);
    A post_exp[kMostClasses], prior_exp[kMostClasses];
    for (std::int64_t g = 0; g < count; ++g) {
      prefetch(post + g * K, K);
      prefetch(prior + g * K, K);
      add_exponentials<kClasses>(post + g * K, prior + g * K, K, post_largest[g], prior_largest[g],
                                 post_exp + g * width, prior_exp + g * width, one[g], two[g],
                                 three[g]);
    }
    join_lanes(one, post_scale, Plus());
    join_lanes(two, prior_scale, Plus());
#pragma omp simd
    for (int g = 0; g < kLanes; ++g) {
      post_scale[g] = A(1) / post_scale[g];
      prior_scale[g] = A(1) / prior_scale[g];
    }
    for (std::int64_t g = 0; g < count; ++g) {
      add_mixtures<kClasses>(post_exp + g * width, prior_exp + g * width, K, share * post_scale[g],
                             share * prior_scale[g], uniform, one[g], two[g], three[g]);
    }
    join_lanes(one, found.kl, Plus());
    join_lanes(two, log_ratio, Plus());
    join_lanes(three, ratio, Plus());
#pragma omp simd
    for (int g = 0; g < kLanes; ++g) {
      log_ratio[g] *= post_scale[g];
      ratio[g] *= prior_scale[g];
    }
  } else {
    for (std::int64_t g = 0; g < count; ++g) {
      prefetch(post + g * K, K);
      prefetch(prior + g * K, K);
      add_exponentials<kClasses>(post + g * K, prior + g * K, K, post_largest[g], prior_largest[g],
                                 static_cast<A*>(nullptr), static_cast<A*>(nullptr), one[g], two[g],
                                 three[g]);
    }
    join_lanes(one, post_scale, Plus());
    join_lanes(two, prior_sum, Plus());
    join_lanes(three, log_ratio, Plus());
#pragma omp simd
    for (int g = 0; g < kLanes; ++g) {
      post_scale[g] = A(1) / post_scale[g];
      prior_scale[g] = A(1) / prior_sum[g];
      log_ratio[g] *= post_scale[g];
      ratio[g] = A(1);
      found.kl[g] = log_ratio[g] + log_of_ratio(prior_sum[g] * post_scale[g]);
    }
  }
}

template <int kClasses, typename T>
FASTRSSM_CLONES ComputeOf<T> row_kl(const T* post, const T* prior, ComputeOf<T>* statistics,
                                    std::int64_t G, std::int64_t K, ComputeOf<T> unimix) {
  using A = ComputeOf<T>;
  if constexpr (kClasses > 0) K = kClasses;
  const std::int64_t most = std::min<std::int64_t>(kLanes, kMostClasses / whole_lines(K));
  A kl = 0;
  Lines<A> lines[3];
  // of variables that do not exist
  if (most < kLanes || G % kLanes != 0) std::memset(lines, 0, sizeof lines);
  Found<A> found;
  for (std::int64_t first = 0; first < G; first += most) {
    const std::int64_t count = std::min(most, G - first);
    find<kClasses>(post + first * K, prior + first * K, count, K, unimix, lines, found);
    if (statistics != nullptr) {
      for (int i = 0; i < kStatistics; ++i) {
        A* to = statistics + i * G + first;
        if (count == kLanes) {
#pragma omp simd
          for (int g = 0; g < kLanes; ++g) to[g] = found.statistics[i][g];
        } else {
          for (int g = 0; g < count; ++g) to[g] = found.statistics[i][g];
        }
      }
    }
#pragma omp simd
    for (int g = 0; g < kLanes; ++g) found.kl[g] = g < count ? found.kl[g] : A(0);
    kl += total(found.kl);
  }
  return kl;
}

template <int kClasses, typename T>
FASTRSSM_CLONES void row_gradients(const T* post, const T* prior, const ComputeOf<T>* statistics,
                                   T* post_grad, T* prior_grad, std::int64_t G, std::int64_t K,
                                   ComputeOf<T> unimix, ComputeOf<T> post_factor,
                                   ComputeOf<T> prior_factor) {
  using A = ComputeOf<T>;
  if constexpr (kClasses > 0) K = kClasses;
  const A share = A(1) - unimix, uniform = unimix / A(K);
  for (std::int64_t g = 0; g < G; ++g, post += K, prior += K, post_grad += K, prior_grad += K) {
    A of[kStatistics];
    for (int i = 0; i < kStatistics; ++i) of[i] = statistics[i * G + g];
    const auto [post_largest, prior_largest, post_scale, prior_scale, log_ratio, ratio] = of;
    if (unimix > A(0)) {
      const A post_share = share * post_scale, prior_share = share * prior_scale;
      const A to_post = post_factor * post_share, to_prior = prior_factor * prior_share;
#pragma omp simd
      for (std::int64_t k = 0; k < K; ++k) {
        const A a = exp_of_difference(widen(post[k]) - post_largest);
        const A b = exp_of_difference(widen(prior[k]) - prior_largest);
        const A quotient = (post_share * a + uniform) / (prior_share * b + uniform);
        narrow(to_post * a * (log_of_ratio(quotient) - log_ratio), post_grad + k);
        narrow(to_prior * b * (ratio - quotient), prior_grad + k);
      }
    } else {
#pragma omp simd
      for (std::int64_t k = 0; k < K; ++k) {
        const A a = widen(post[k]) - post_largest, b = widen(prior[k]) - prior_largest;
        const A s = post_scale * exp_of_difference(a), t = prior_scale * exp_of_difference(b);
        narrow(post_factor * s * ((a - b) - log_ratio), post_grad + k);
        narrow(prior_factor * (t - s), prior_grad + k);
      }
    }
  }
}

}  // namespace

template <typename T>
void categorical_kl_forward(const T* post_logits, const T* prior_logits, ComputeOf<T>* kl,
                            ComputeOf<T>* statistics, std::int64_t N, std::int64_t G,
                            std::int64_t K, double unimix, int threads) {
  auto* row = row_kl<0, T>;
  if constexpr (sizeof(T) < sizeof(double)) {
    row = K == 16 ? row_kl<16, T> : K == 32 ? row_kl<32, T> : K == 64 ? row_kl<64, T> : row;
  }
#pragma omp parallel for num_threads(threads) if (N * G * K > kParallelFrom)
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t at = n * G * K;
    kl[n] = row(post_logits + at, prior_logits + at,
                statistics == nullptr ? nullptr : statistics + n * kStatistics * G, G, K,
                ComputeOf<T>(unimix));
  }
}

template <typename T>
void categorical_kl_backward(const ComputeOf<T>* grad, const T* post_logits, const T* prior_logits,
                             const ComputeOf<T>* kl, const ComputeOf<T>* statistics, T* post_grad,
                             T* prior_grad, std::int64_t N, std::int64_t G, std::int64_t K,
                             double unimix, double post_scale, double prior_scale, double free_nats,
                             int threads) {
  using A = ComputeOf<T>;
  auto* row = row_gradients<0, T>;
  if constexpr (sizeof(T) < sizeof(double)) {
    row = K == 16   ? row_gradients<16, T>
          : K == 32 ? row_gradients<32, T>
          : K == 64 ? row_gradients<64, T>
                    : row;
  }
#pragma omp parallel for num_threads(threads) if (N * G * K > kParallelFrom)
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t at = n * G * K;
    const A g = is_free(kl[n], A(free_nats)) ? A(0) : grad[n];
    row(post_logits + at, prior_logits + at, statistics + n * kStatistics * G, post_grad + at,
        prior_grad + at, G, K, A(unimix), A(post_scale) * g, A(prior_scale) * g);
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                                   \
  template void categorical_kl_forward<T>(const T*, const T*, ComputeOf<T>*, ComputeOf<T>*,       \
                                          std::int64_t, std::int64_t, std::int64_t, double, int); \
  template void categorical_kl_backward<T>(                                                       \
      const ComputeOf<T>*, const T*, const T*, const ComputeOf<T>*, const ComputeOf<T>*, T*, T*,  \
      std::int64_t, std::int64_t, std::int64_t, double, double, double, double, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
FASTRSSM_INSTANTIATE(BFloat16)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
