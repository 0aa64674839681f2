#include <cstdint>
#include <limits>

#include "common/math.h"
#include "common/number.h"
#include "cpu/ops.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// What is kept of the groups at hand between passes over their classes, each padded to whole lines
// of lanes. A padding has probability 0 in both distributions and the same mixture, so it adds
// nothing.
template <typename A>
struct Scratch {
  // exponentials of the logits, less the largest; of a mixture the softmaxes
  A post[kMostClasses], prior[kMostClasses];
  // of the mixtures
  A ratio[kMostClasses], log_ratio[kMostClasses];
};

// That of one kept.
template <typename A>
struct Kept {
  A *post, *prior, *ratio, *log_ratio;

  Kept(Scratch<A>& scratch, std::int64_t at)
      : post(scratch.post + at),
        prior(scratch.prior + at),
        ratio(scratch.ratio + at),
        log_ratio(scratch.log_ratio + at) {}
};

// Over the classes of a kept.
template <typename A>
struct Sums {
  A largest_post, largest_prior;
  A post, prior;  // of the exponentials
  A difference;   // of (post logit - prior logit) weighted by the exponential of the first
};

template <typename A>
[[gnu::always_inline]] inline A larger(A a, A b) {
  return a > b ? a : b;
}

// A line of logits, less `shift`; where there are none, `padding`.
template <typename T, typename A>
[[gnu::always_inline]] inline void load(const T* logits, std::int64_t count, A shift, A padding,
                                        A (&line)[kLanes]) {
  if (count >= kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) line[i] = widen(logits[i]) - shift;
  } else {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) line[i] = i < count ? widen(logits[i]) - shift : padding;
  }
}

template <typename T>
[[gnu::always_inline]] inline ComputeOf<T> largest(const T* logits, std::int64_t K) {
  using A = ComputeOf<T>;
  constexpr A kLeast = -std::numeric_limits<A>::infinity();
  A found[kLanes], line[kLanes], half[8], quarter[4];
  load(logits, K, A(0), kLeast, found);
  for (std::int64_t k = kLanes; k < K; k += kLanes) {
    load(logits + k, K - k, A(0), kLeast, line);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) found[i] = larger(line[i], found[i]);
  }
#pragma omp simd
  for (int i = 0; i < 8; ++i) half[i] = larger(found[i], found[i + 8]);
#pragma omp simd
  for (int i = 0; i < 4; ++i) quarter[i] = larger(half[i], half[i + 4]);
  return larger(larger(quarter[0], quarter[2]), larger(quarter[1], quarter[3]));
}

// kept.post, kept.prior and the rest of sums, whose largest logits are known
template <typename T>
[[gnu::always_inline]] inline void exponentials(const T* post, const T* prior, std::int64_t K,
                                                Kept<ComputeOf<T>> kept, Sums<ComputeOf<T>>& sums) {
  using A = ComputeOf<T>;
  constexpr A kVanishing = -1e4;
  A post_sum[kLanes] = {}, prior_sum[kLanes] = {}, difference[kLanes] = {};
  for (std::int64_t k = 0; k < K; k += kLanes) {
    A a[kLanes], b[kLanes];
    load(post + k, K - k, sums.largest_post, kVanishing, a);
    load(prior + k, K - k, sums.largest_prior, kVanishing, b);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const A post_exp = exp_of(a[i]), prior_exp = exp_of(b[i]);
      post_sum[i] += post_exp;
      prior_sum[i] += prior_exp;
      difference[i] += post_exp * (a[i] - b[i]);
      kept.post[k + i] = post_exp;
      kept.prior[k + i] = prior_exp;
    }
  }
  sums.post = total(post_sum);
  sums.prior = total(prior_sum);
  sums.difference = total(difference);
}

// Sums over the mixtures q = (1 - unimix) s + unimix / K and p, from softmaxes s and t.
template <typename A>
struct MixedSums {
  A kl;         // q log(q / p)
  A log_ratio;  // s log(q / p)
  A ratio;      // t q / p
};

// kept.post, kept.prior: exponentials -> softmaxes
template <typename A>
[[gnu::always_inline]] inline MixedSums<A> mix(const Sums<A>& sums, std::int64_t K, A unimix,
                                               Kept<A> kept) {
  const A post_scale = A(1) / sums.post, prior_scale = A(1) / sums.prior;
  const A share = A(1) - unimix, uniform = unimix / A(K);
  A kl[kLanes] = {}, log_ratios[kLanes] = {}, ratios[kLanes] = {};
  for (std::int64_t k = 0; k < K; k += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const A s = kept.post[k + i] * post_scale, t = kept.prior[k + i] * prior_scale;
      const A q = share * s + uniform, p = share * t + uniform;
      const A ratio = q / p, log_ratio = log_of(ratio);
      kl[i] += q * log_ratio;
      log_ratios[i] += s * log_ratio;
      ratios[i] += t * ratio;
      kept.post[k + i] = s;
      kept.prior[k + i] = t;
      kept.ratio[k + i] = ratio;
      kept.log_ratio[k + i] = log_ratio;
    }
  }
  return {total(kl), total(log_ratios), total(ratios)};
}

// The unit gradients of a group whose softmaxes were mixed.
template <typename T, typename A>
[[gnu::always_inline]] inline void mixed_units(const MixedSums<A>& mixed, Kept<A> kept,
                                               std::int64_t K, A unimix, T* post_unit,
                                               T* prior_unit) {
  const A share = A(1) - unimix;
#pragma omp simd
  for (std::int64_t k = 0; k < K; ++k) {
    narrow(share * kept.post[k] * (kept.log_ratio[k] - mixed.log_ratio), post_unit + k);
    narrow(share * kept.prior[k] * (mixed.ratio - kept.ratio[k]), prior_unit + k);
  }
}

// The same without a mixture, where the gradients simplify.
template <typename T, typename A>
[[gnu::always_inline]] inline void plain_units(const Sums<A>& sums, Kept<A> kept, const T* post,
                                               const T* prior, std::int64_t K, T* post_unit,
                                               T* prior_unit) {
  const A post_scale = A(1) / sums.post, prior_scale = A(1) / sums.prior;
  const A mean = sums.difference * post_scale;
#pragma omp simd
  for (std::int64_t k = 0; k < K; ++k) {
    const A a = widen(post[k]) - sums.largest_post, b = widen(prior[k]) - sums.largest_prior;
    const A s = kept.post[k] * post_scale, t = kept.prior[k] * prior_scale;
    narrow(s * ((a - b) - mean), post_unit + k);
    narrow(t - s, prior_unit + k);
  }
}

// KL of a row, and its gradients unless post_unit is null. kClasses is K where it is known at
// compile time, which saves a seventh, else 0.
template <int kClasses, typename T>
FASTRSSM_CLONES ComputeOf<T> row_kl(const T* post, const T* prior, T* post_unit, T* prior_unit,
                                    std::int64_t G, std::int64_t K, ComputeOf<T> unimix) {
  using A = ComputeOf<T>;
  if (kClasses > 0) K = kClasses;
  const std::int64_t padded = (K + kLanes - 1) / kLanes * kLanes;
  const std::int64_t most = std::min<std::int64_t>(kLanes, kMostClasses / padded);
  Scratch<A> scratch;
  A kl = 0;
  for (std::int64_t first = 0; first < G; first += most) {
    const std::int64_t groups = std::min(most, G - first), at = first * K;
    Sums<A> sums[kLanes];
    A terms[kLanes] = {}, ratios[kLanes];
    std::fill_n(ratios, kLanes, A(1));
    // pass by pass over several groups: those of one group alone would wait for each other
    for (std::int64_t g = 0; g < groups; ++g) {
      sums[g].largest_post = largest(post + at + g * K, K);
      sums[g].largest_prior = largest(prior + at + g * K, K);
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t from = at + g * K;
      exponentials(post + from, prior + from, K, {scratch, g * padded}, sums[g]);
    }
    if (unimix > A(0)) {
      MixedSums<A> mixed[kLanes];
      for (std::int64_t g = 0; g < groups; ++g) {
        mixed[g] = mix(sums[g], K, unimix, {scratch, g * padded});
        terms[g] = mixed[g].kl;
      }
      for (std::int64_t g = 0; g < groups && post_unit != nullptr; ++g) {
        const std::int64_t to = at + g * K;
        mixed_units(mixed[g], {scratch, g * padded}, K, unimix, post_unit + to, prior_unit + to);
      }
    } else {
      for (std::int64_t g = 0; g < groups; ++g) {
        terms[g] = sums[g].difference / sums[g].post;
        ratios[g] = sums[g].prior / sums[g].post;
      }
      for (std::int64_t g = 0; g < groups && post_unit != nullptr; ++g) {
        const std::int64_t to = at + g * K;
        plain_units(sums[g], {scratch, g * padded}, post + to, prior + to, K, post_unit + to,
                    prior_unit + to);
      }
    }
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) terms[i] += log_of(ratios[i]);
    kl += total(terms);
  }
  return kl;
}

template <typename T>
FASTRSSM_CLONES void scale(const T* from, T* to, std::int64_t count, ComputeOf<T> factor) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) narrow(factor * widen(from[i]), to + i);
}

}  // namespace

template <typename T>
void categorical_kl_forward(const T* post_logits, const T* prior_logits, ComputeOf<T>* kl,
                            T* post_unit, T* prior_unit, std::int64_t N, std::int64_t G,
                            std::int64_t K, double unimix, int threads) {
  const auto row = K == 32 ? row_kl<32, T> : row_kl<0, T>;
#pragma omp parallel for num_threads(threads) if (N * G * K > kParallelFrom)
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t at = n * G * K;
    const bool wanted = post_unit != nullptr;
    kl[n] = row(post_logits + at, prior_logits + at, wanted ? post_unit + at : nullptr,
                wanted ? prior_unit + at : nullptr, G, K, ComputeOf<T>(unimix));
  }
}

template <typename T>
void categorical_kl_backward(const ComputeOf<T>* grad, const ComputeOf<T>* kl, const T* post_unit,
                             const T* prior_unit, T* post_grad, T* prior_grad, std::int64_t N,
                             std::int64_t S, double post_scale, double prior_scale,
                             double free_nats, int threads) {
  using A = ComputeOf<T>;
#pragma omp parallel for num_threads(threads) if (N * S > kParallelFrom)
  for (std::int64_t n = 0; n < N; ++n) {
    const A g = is_free(kl[n], A(free_nats)) ? A(0) : grad[n];
    scale(post_unit + n * S, post_grad + n * S, S, A(post_scale) * g);
    scale(prior_unit + n * S, prior_grad + n * S, S, A(prior_scale) * g);
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                                    \
  template void categorical_kl_forward<T>(const T*, const T*, ComputeOf<T>*, T*, T*, std::int64_t, \
                                          std::int64_t, std::int64_t, double, int);                \
  template void categorical_kl_backward<T>(const ComputeOf<T>*, const ComputeOf<T>*, const T*,     \
                                           const T*, T*, T*, std::int64_t, std::int64_t, double,   \
                                           double, double, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
FASTRSSM_INSTANTIATE(BFloat16)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
