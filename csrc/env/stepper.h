// A vector of MuJoCo environments stepped by a pool of threads.
//
// MuJoCo is known here only by opaque pointers and by functions found in the library that
// `import mujoco` has loaded, so that one binary serves every release with the same semantics.
// Task functions are C function pointers (compiled by numba); they never see a thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace fastrssm {

using Fields =
    double* const*;  // addresses of one environment's arrays, in the order of envs/physics.py

struct TaskFunctions {
  void (*reset)(Fields, std::uint32_t* rng);     // draws the initial pose
  void (*observe)(Fields, double* observation);  // writes all sensors, concatenated
  double (*reward)(Fields);                      // after every control step
  double (*finish)(Fields, double total);        // after the last one; null: the sum stays
};

// Function pointers of the MuJoCo library that is already in the process.
struct Mujoco {
  explicit Mujoco(const std::string& library);
  void (*step)(const void*, void*);
  void (*step1)(const void*, void*);
  void (*step2)(const void*, void*);
  void (*forward)(const void*, void*);
  void (*reset_data)(const void*, void*);
  void (*set_state)(const void*, void*, const double*, unsigned int);
  void** time_callback;  // feeds MuJoCo's timers only, and costs 5 to 13 % of a step
};

// Calls work(thread, index) for every index in [0, count); the caller is thread 0. Each thread
// starts with its own share, so that an environment stays in one core's cache, and then helps the
// others.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  template <typename Work>
  void run(int count, Work& work) {
    call_ = [](void* w, int thread, int index) { (*static_cast<Work*>(w))(thread, index); };
    work_ = &work;
    start(count);
  }
  int num_threads() const { return static_cast<int>(shares_.size()); }

 private:
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };
  void start(int count);
  void loop(int thread);
  void take(int thread);

  void (*call_)(void*, int, int) = nullptr;
  void* work_ = nullptr;
  std::vector<Share> shares_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
};

struct StepperConfig {
  std::string library;  // path of the loaded libmujoco
  std::uint64_t model;  // mjModel*
  std::uint64_t
      passive_model;  // the same with actuation disabled, which dm_control uses while it resets
  std::vector<std::uint64_t> data;                 // [N] mjData*
  std::vector<std::vector<std::uint64_t>> fields;  // [N][F] double*
  std::vector<std::uint64_t> rng;                  // [N] uint32*, RNG_WORDS words each
  int ctrl_field;                                  // which of the fields holds the controls
  int num_controls;
  int observation_size;
  int substeps;       // physics steps of a control step
  int action_repeat;  // control steps of a step
  int episode_steps;  // control steps of an episode
  int settle_steps;   // physics steps between the initial pose and the first observation
  bool runge_kutta;   // the integrator cannot be split into step1 and step2
  int num_threads;
};

class Stepper {
 public:
  Stepper(StepperConfig config, TaskFunctions task);

  // Starts new episodes. observation: [N, observation_size].
  template <typename T>
  void reset(T* observation);

  // action: [N, num_controls]; observation: [N, observation_size]; reward, truncated: [N]. An
  // environment whose episode ended in the previous call is reset instead: its action is ignored,
  // its reward is 0. Returns the first environment whose state is no longer finite, or -1.
  template <typename T>
  int step(const T* action, T* observation, double* reward, bool* truncated);

  // Control steps of the current episodes, [N]: all that the loop remembers between calls.
  const std::vector<int>& steps() const { return steps_; }
  // steps: [N], each in [0, episode_steps]; a complete episode is reset by the next call.
  void set_steps(std::vector<int> steps);

  int num_threads() const { return pool_.num_threads(); }

 private:
  void reset_one(int n);
  double step_one(int n);
  void advance(void* data, int substeps);
  template <typename T>
  bool observe(int n, int thread, T* observation);

  StepperConfig config_;
  TaskFunctions task_;
  Mujoco mujoco_;
  const void* model_;
  const void* passive_model_;
  std::vector<std::vector<double*>> fields_;
  std::vector<int> steps_;          // control steps of the current episode
  std::vector<std::uint8_t> over_;  // reset instead of stepping in the next call
  std::vector<double> scratch_;     // [threads, observation_size]
  ThreadPool pool_;
};

}  // namespace fastrssm
