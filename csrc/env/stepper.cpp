#include "env/stepper.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace fastrssm {
namespace {

constexpr unsigned int kStateTime = 1;   // mjSTATE_TIME
constexpr int kSpins = 2000;             // about 20 us of looking before a thread sleeps
constexpr int kBadStates[] = {3, 4, 5};  // mjWARN_BADQPOS, BADQVEL, BADQACC

template <typename F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("this MuJoCo has no function ") + name);
}

void say_nothing(const char*) {}

// MuJoCo's clock and its printed warnings are switched off while any loop runs; what the warnings
// say about a state, `diverged` says too.
class Quiet {
 public:
  explicit Quiet(const Mujoco& mujoco) : mujoco_(mujoco) {
    const std::lock_guard lock(mutex_);
    if (users_++ > 0) return;
    clock_ = std::exchange(*mujoco_.time_callback, nullptr);
    warning_ = std::exchange(*mujoco_.user_warning, reinterpret_cast<void*>(&say_nothing));
  }
  ~Quiet() {
    const std::lock_guard lock(mutex_);
    if (--users_ > 0) return;
    *mujoco_.time_callback = clock_;
    *mujoco_.user_warning = warning_;
  }

 private:
  static inline std::mutex mutex_;
  static inline int users_ = 0;
  static inline void* clock_ = nullptr;
  static inline void* warning_ = nullptr;
  const Mujoco& mujoco_;
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
  find(handle, "mju_user_warning", user_warning);
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
      engines_(config_.data.size()),
      steps_(config_.data.size()),
      scratch_(config_.models.size() * config_.observation_size),
      pool_(static_cast<int>(config_.models.size())) {
  for (std::size_t n = 0; n < config_.data.size(); ++n) {
    std::vector<double*>& pointers = fields_.emplace_back();
    for (std::uint64_t address : config_.fields[n]) {
      pointers.push_back(reinterpret_cast<double*>(address));
    }
    engines_[n] = {this, static_cast<int>(n), 0};
    const std::uint64_t words[] = {reinterpret_cast<std::uint64_t>(&forward_engine),
                                   reinterpret_cast<std::uint64_t>(&reset_engine),
                                   reinterpret_cast<std::uint64_t>(&engines_[n])};
    std::memcpy(pointers[config_.engine_field], words, sizeof(words));
  }
}

std::int64_t Stepper::forward_engine(std::uint64_t engine) {
  const auto& [stepper, n, thread] = *reinterpret_cast<const Engine*>(engine);
  stepper->forward_passive(n, thread);
  return *reinterpret_cast<const int*>(stepper->config_.contacts[n]);
}

std::int64_t Stepper::reset_engine(std::uint64_t engine) {
  const auto& [stepper, n, thread] = *reinterpret_cast<const Engine*>(engine);
  stepper->mujoco_.reset_data(stepper->model(thread), stepper->data(n));
  return forward_engine(engine);
}

const void* Stepper::model(int thread) const {
  return reinterpret_cast<const void*>(config_.models[thread].model);
}

void Stepper::place_parameters(int n, int thread) {
  const std::vector<std::uint64_t>& places = config_.models[thread].parameters;
  const double* values = fields_[n][config_.parameters_field];
  for (std::size_t p = 0; p < places.size(); ++p) {
    *reinterpret_cast<double*>(places[p]) = values[p % (places.size() / 2)];
  }
}

void Stepper::forward_passive(int n, int thread) {
  place_parameters(n, thread);
  mujoco_.forward(reinterpret_cast<const void*>(config_.models[thread].passive), data(n));
}

// dm_control's order: after the last substep everything that depends on position and velocity is
// computed anew.
void Stepper::advance(int n, int thread, int substeps) {
  const void* model = this->model(thread);
  void* data = this->data(n);
  if (config_.runge_kutta) {
    mujoco_.step(model, data);
  } else {
    mujoco_.step2(model, data);
  }
  for (int s = 1; s < substeps; ++s) mujoco_.step(model, data);
  mujoco_.step1(model, data);
}

void Stepper::reset_one(int n, int thread) {
  mujoco_.reset_data(model(thread), data(n));
  forward_passive(n, thread);
  engines_[n].thread = thread;
  task_.reset(fields_[n].data(), reinterpret_cast<std::uint32_t*>(config_.rng[n]));
  place_parameters(n, thread);
  if (config_.settle_steps > 0) {
    advance(n, thread, config_.settle_steps);
    const double time = 0;
    mujoco_.set_state(model(thread), data(n), &time, kStateTime);
  }
  forward_passive(n, thread);
  steps_[n] = 0;
}

bool Stepper::bad_state(int n) const {
  const int* warnings = reinterpret_cast<const int*>(config_.warnings[n]);
  int bad = 0;
  for (int kind : kBadStates) bad |= warnings[2 * kind + 1];
  return bad != 0;
}

// Returns false, and the reward of the control steps before, if the physics diverges.
bool Stepper::step_one(int n, int thread, double* reward) {
  place_parameters(n, thread);
  *reward = 0;
  for (int c = 0; c < config_.action_repeat && !over(n); ++c) {
    advance(n, thread, config_.substeps);
    if (bad_state(n)) return false;
    *reward += task_.reward(fields_[n].data());
    ++steps_[n];
  }
  if (task_.finish) *reward = task_.finish(fields_[n].data(), *reward);
  return true;
}

template <typename T>
bool Stepper::observe_one(int n, int thread, T* observation) {
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
void Stepper::reset(const bool* mask, T* observation) {
  const Quiet quiet(mujoco_);
  auto work = [&](int thread, int n) {
    if (mask && !mask[n]) return;
    reset_one(n, thread);
    observe_one(n, thread, observation);
  };
  pool_.run(static_cast<int>(config_.data.size()), work);
}

template <typename T>
void Stepper::observe(T* observation) {
  auto work = [&](int thread, int n) { observe_one(n, thread, observation); };
  pool_.run(static_cast<int>(config_.data.size()), work);
}

template <typename T>
void Stepper::step(const T* action, const T* previous, const Outputs<T>& out) {
  const Quiet quiet(mujoco_);
  const std::size_t size = config_.observation_size;
  auto work = [&](int thread, int n) {
    out.diverged[n] = false;
    if (over(n) && config_.autoreset == Autoreset::kNextStep) {
      reset_one(n, thread);
      observe_one(n, thread, out.observation);
      out.reward[n] = 0;
      out.truncated[n] = false;
      return;
    }
    double* ctrl = fields_[n][config_.ctrl_field];
    const T* row = action + static_cast<std::size_t>(n) * config_.num_controls;
    for (int k = 0; k < config_.num_controls; ++k) ctrl[k] = std::clamp<double>(row[k], -1, 1);
    const bool sound = step_one(n, thread, &out.reward[n]) &&
                       observe_one(n, thread, out.observation) && std::isfinite(out.reward[n]);
    if (!sound) {
      std::copy_n(previous + n * size, size, out.observation + n * size);
      if (!std::isfinite(out.reward[n])) out.reward[n] = 0;
      out.diverged[n] = true;
      steps_[n] = config_.episode_steps;
    }
    out.truncated[n] = over(n);
    if (over(n) && config_.autoreset == Autoreset::kSameStep) {
      std::copy_n(out.observation + n * size, size, out.final_observation + n * size);
      reset_one(n, thread);
      observe_one(n, thread, out.observation);
    }
  };
  pool_.run(static_cast<int>(config_.data.size()), work);
}

template void Stepper::reset<float>(const bool*, float*);
template void Stepper::reset<double>(const bool*, double*);
template void Stepper::observe<float>(float*);
template void Stepper::observe<double>(double*);
template void Stepper::step<float>(const float*, const float*, const Outputs<float>&);
template void Stepper::step<double>(const double*, const double*, const Outputs<double>&);

}  // namespace fastrssm
