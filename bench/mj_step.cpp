// The limit of workload envs: mj_step on every environment and nothing else. Threads are pinned,
// spin at the barrier, keep their share of the environments in their core's cache and then help
// others.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kSpins = 2000;  // then a thread sleeps: other providers have their turn

struct Sizes {
  int num_envs, num_controls, substeps, num_threads;
};

struct alignas(64) Share {
  std::atomic<int> next{0};
  int end = 0;
};

class Limit {
 public:
  Limit(void (*step)(const void*, void*), const void* model, void* const* data, double* const* ctrl,
        Sizes sizes)
      : step_(step),
        model_(model),
        data_(data, data + sizes.num_envs),
        ctrl_(ctrl, ctrl + sizes.num_envs),
        sizes_(sizes),
        shares_(sizes.num_threads) {
    sched_getaffinity(0, sizeof(allowed_), &allowed_);
    for (int t = 1; t < sizes.num_threads; ++t) threads_.emplace_back([this, t] { loop(t); });
  }

  ~Limit() {
    stop_ = true;
    begin();
  }

  void run(const float* action) {
    const int threads = sizes_.num_threads;
    action_ = action;
    for (int t = 0; t < threads; ++t) {
      shares_[t].next = sizes_.num_envs * t / threads;
      shares_[t].end = sizes_.num_envs * (t + 1) / threads;
    }
    running_ = threads - 1;
    begin();
    // the caller is pinned only here, for the other providers have the same thread
    pin(0);
    take(0);
    while (running_ != 0) {
    }
    sched_setaffinity(0, sizeof(allowed_), &allowed_);
  }

 private:
  void begin() {
    ++epoch_;
    epoch_.notify_all();
  }

  void pin(int thread) const {
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed_) && seen++ == thread % CPU_COUNT(&allowed_)) CPU_SET(cpu, &one);
    }
    sched_setaffinity(0, sizeof(one), &one);
  }

  void take(int thread) {
    for (int k = 0; k < sizes_.num_threads; ++k) {
      Share& share = shares_[(thread + k) % sizes_.num_threads];
      for (int n; (n = share.next++) < share.end;) {
        for (int c = 0; c < sizes_.num_controls; ++c) {
          ctrl_[n][c] = action_[n * sizes_.num_controls + c];
        }
        for (int s = 0; s < sizes_.substeps; ++s) step_(model_, data_[n]);
      }
    }
  }

  void loop(int thread) {
    pin(thread);
    for (std::uint32_t seen = 0; !stop_;) {
      for (int spins = 0; epoch_ == seen;) {
        if (++spins > kSpins) epoch_.wait(seen);
      }
      ++seen;
      if (stop_) return;
      take(thread);
      --running_;
    }
  }

  void (*step_)(const void*, void*);
  const void* model_;
  std::vector<void*> data_;
  std::vector<double*> ctrl_;
  Sizes sizes_;
  std::vector<Share> shares_;
  const float* action_ = nullptr;
  cpu_set_t allowed_;
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  // joined first, while all else is alive
  std::vector<std::jthread> threads_;
};

}  // namespace

extern "C" {

void* limit_make(void (*step)(const void*, void*), const void* model, void* const* data,
                 double* const* ctrl, const Sizes* sizes) {
  return new Limit(step, model, data, ctrl, *sizes);
}

void limit_run(void* limit, const float* action) { static_cast<Limit*>(limit)->run(action); }

void limit_free(void* limit) { delete static_cast<Limit*>(limit); }
}
