#include "env/stepper.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace fastrssm {
namespace {

constexpr unsigned int kStateTime = 1;  // mjSTATE_TIME
constexpr int kSpins = 2000;            // about 20 us of looking before a thread sleeps

template <typename F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("this MuJoCo has no function ") + name);
}

// MuJoCo's clock is switched off for the life of this object.
class NoClock {
 public:
  explicit NoClock(void** callback) : callback_(callback), saved_(*callback) {
    *callback_ = nullptr;
  }
  ~NoClock() { *callback_ = saved_; }

 private:
  void** callback_;
  void* saved_;
};

}  // namespace

Mujoco::Mujoco(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error(library + " is not loaded: import mujoco first");
  find(handle, "mj_step", step);
  find(handle, "mj_step1", step1);
  find(handle, "mj_step2", step2);
  find(handle, "mj_forward", forward);
  find(handle, "mj_resetData", reset_data);
  find(handle, "mj_setState", set_state);
  find(handle, "mjcb_time", time_callback);
}

ThreadPool::ThreadPool(int num_threads) : shares_(num_threads) {
  for (int t = 1; t < num_threads; ++t) threads_.emplace_back([this, t] { loop(t); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::start(int count) {
  const int threads = num_threads();
  for (int t = 0; t < threads; ++t) {
    shares_[t].next.store(static_cast<int>(std::int64_t{count} * t / threads),
                          std::memory_order_relaxed);
    shares_[t].end = static_cast<int>(std::int64_t{count} * (t + 1) / threads);
  }
  running_.store(threads - 1, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  if (threads > 1) epoch_.notify_all();
  take(0);
  for (int left, spins = 0; (left = running_.load(std::memory_order_acquire)) != 0;) {
    if (++spins > kSpins) running_.wait(left, std::memory_order_acquire);
  }
}

void ThreadPool::take(int thread) {
  const int threads = num_threads();
  for (int k = 0; k < threads; ++k) {
    Share& share = shares_[(thread + k) % threads];
    for (int i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      call_(work_, thread, i);
    }
  }
}

void ThreadPool::loop(int thread) {
  for (std::uint32_t seen = 0;;) {
    for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen;) {
      if (++spins > kSpins) epoch_.wait(seen, std::memory_order_acquire);
    }
    ++seen;
    if (stop_) return;
    take(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

Stepper::Stepper(StepperConfig config, TaskFunctions task)
    : config_(std::move(config)),
      task_(task),
      mujoco_(config_.library),
      model_(reinterpret_cast<const void*>(config_.model)),
      passive_model_(reinterpret_cast<const void*>(config_.passive_model)),
      steps_(config_.data.size()),
      over_(config_.data.size()),
      scratch_(static_cast<std::size_t>(config_.num_threads) * config_.observation_size),
      pool_(config_.num_threads) {
  for (const std::vector<std::uint64_t>& addresses : config_.fields) {
    std::vector<double*>& pointers = fields_.emplace_back();
    for (std::uint64_t address : addresses) pointers.push_back(reinterpret_cast<double*>(address));
  }
}

// dm_control's order: after the last substep everything that depends on position and velocity is
// computed anew.
void Stepper::advance(void* data, int substeps) {
  if (config_.runge_kutta) {
    mujoco_.step(model_, data);
  } else {
    mujoco_.step2(model_, data);
  }
  for (int s = 1; s < substeps; ++s) mujoco_.step(model_, data);
  mujoco_.step1(model_, data);
}

void Stepper::reset_one(int n) {
  void* data = reinterpret_cast<void*>(config_.data[n]);
  mujoco_.reset_data(model_, data);
  mujoco_.forward(passive_model_, data);
  task_.reset(fields_[n].data(), reinterpret_cast<std::uint32_t*>(config_.rng[n]));
  if (config_.settle_steps > 0) {
    advance(data, config_.settle_steps);
    const double time = 0;
    mujoco_.set_state(model_, data, &time, kStateTime);
  }
  mujoco_.forward(passive_model_, data);
  steps_[n] = 0;
  over_[n] = 0;
}

double Stepper::step_one(int n) {
  double total = 0;
  for (int c = 0; c < config_.action_repeat && steps_[n] < config_.episode_steps; ++c) {
    advance(reinterpret_cast<void*>(config_.data[n]), config_.substeps);
    total += task_.reward(fields_[n].data());
    ++steps_[n];
  }
  over_[n] = steps_[n] >= config_.episode_steps;
  return task_.finish ? task_.finish(fields_[n].data(), total) : total;
}

template <typename T>
bool Stepper::observe(int n, int thread, T* observation) {
  const int size = config_.observation_size;
  double* values = scratch_.data() + static_cast<std::size_t>(thread) * size;
  task_.observe(fields_[n].data(), values);
  T* row = observation + static_cast<std::size_t>(n) * size;
  bool finite = true;
  for (int i = 0; i < size; ++i) {
    finite &= std::isfinite(values[i]);
    row[i] = static_cast<T>(values[i]);
  }
  return finite;
}

template <typename T>
void Stepper::reset(T* observation) {
  NoClock no_clock(mujoco_.time_callback);
  auto work = [&](int thread, int n) {
    reset_one(n);
    observe(n, thread, observation);
  };
  pool_.run(static_cast<int>(config_.data.size()), work);
}

template <typename T>
int Stepper::step(const T* action, T* observation, double* reward, bool* truncated) {
  NoClock no_clock(mujoco_.time_callback);
  std::atomic<int> diverged{-1};
  auto work = [&](int thread, int n) {
    if (over_[n]) {
      reset_one(n);
      reward[n] = 0;
    } else {
      double* ctrl = fields_[n][config_.ctrl_field];
      const T* row = action + static_cast<std::size_t>(n) * config_.num_controls;
      for (int k = 0; k < config_.num_controls; ++k) ctrl[k] = std::clamp<double>(row[k], -1, 1);
      reward[n] = step_one(n);
    }
    truncated[n] = over_[n];
    if (!observe(n, thread, observation)) diverged = n;
  };
  pool_.run(static_cast<int>(config_.data.size()), work);
  return diverged;
}

void Stepper::set_steps(std::vector<int> steps) {
  steps_ = std::move(steps);
  for (std::size_t n = 0; n < steps_.size(); ++n) over_[n] = steps_[n] >= config_.episode_steps;
}

template void Stepper::reset<float>(float*);
template void Stepper::reset<double>(double*);
template int Stepper::step<float>(const float*, float*, double*, bool*);
template int Stepper::step<double>(const double*, double*, double*, bool*);

}  // namespace fastrssm
