// The limits: multiply-adds between registers, and memory that is read once, and nothing else.
#include <immintrin.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
typedef float Lanes __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);
// enough to hide the latency of two units, and few enough for the registers of AVX2
constexpr int kSums = 12;

void multiply_float32(std::int64_t rounds) {
  Lanes sums[kSums] = {}, x = Lanes{} + 1.0f;
  // no register may be found constant or unused
  asm volatile("" : "+v"(x));
  for (std::int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      sum = sum * x + x;
      asm volatile("" : "+v"(sum));
    }
  }
}

#ifdef __AVX512BF16__
void multiply_bfloat16(std::int64_t rounds) {
  __m512 sums[kSums];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const auto x = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (std::int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, x, x);
      asm volatile("" : "+v"(sum));
    }
  }
}
constexpr bool kHasBfloat16 = true;
#else
void multiply_bfloat16(std::int64_t) {}
constexpr bool kHasBfloat16 = false;
#endif

// asked for so many bytes before they are added
constexpr int kAhead = 1024;
constexpr int kStreams = 2, kVectors = 2;

}  // namespace

extern "C" {

// Reads `bytes` from each of two places, by the pattern that is fastest from a third-level cache.
float peak_read(const char* first, const char* second, std::int64_t bytes) {
  const char* from[kStreams] = {first, second};
  Lanes sums[kStreams][kVectors] = {};
  for (std::int64_t at = 0; at + kVectors * kBytes <= bytes; at += kVectors * kBytes) {
#pragma GCC unroll 2
    for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const char* here = from[s] + at + v * kBytes;
        __builtin_prefetch(here + kAhead);
        sums[s][v] += *reinterpret_cast<const Lanes*>(here);
      }
    }
  }
  const Lanes all = sums[0][0] + sums[0][1] + sums[1][0] + sums[1][1];
  return all[0];
}

int peak_has_bfloat16() { return kHasBfloat16; }

// Takes as long as `flop` operations take on all threads together.
void peak_run(int bfloat16, double flop, int threads) {
  const double each = 2.0 * kSums * kLanes * (bfloat16 ? 2 : 1);
  const auto rounds = static_cast<std::int64_t>(flop / each / threads);
  const auto multiply = bfloat16 ? multiply_bfloat16 : multiply_float32;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(multiply, rounds);
  multiply(rounds);
  for (auto& other : others) other.join();
}

}  // extern "C"
