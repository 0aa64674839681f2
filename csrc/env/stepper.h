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
#include <utility>
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
  void** user_warning;   // null: warnings are printed and written to a file
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

// What happens when an episode ends.
enum class Autoreset : int {
  kNextStep,  // the next call resets the environment instead of stepping it
  kSameStep,  // the call that ends it resets it too and keeps the last observation apart
  kDisabled,  // nothing, until reset
};

// A thread's models: the same two for all threads unless resets draw parameters of the model.
struct ThreadModels {
  std::uint64_t model;    // mjModel*
  std::uint64_t passive;  // the same with actuation disabled, as in dm_control's resets
  std::vector<std::uint64_t> parameters;  // double* of each parameter in both: [2 * P]
};

struct StepperConfig {
  std::string library;                             // path of the loaded libmujoco
  std::vector<ThreadModels> models;                // [threads]
  std::vector<std::uint64_t> data;                 // [N] mjData*
  std::vector<std::uint64_t> contacts;             // [N] int*, the number of contacts
  std::vector<std::uint64_t> warnings;             // [N] int*, twice as many as kinds of warning
  std::vector<std::vector<std::uint64_t>> fields;  // [N][F] double*
  std::vector<std::uint64_t> rng;                  // [N] uint32*, RNG_WORDS words each
  int ctrl_field;                                  // which of the fields holds the controls,
  int parameters_field;                            // the drawn parameters [P],
  int engine_field;                                // and the three words of `Engine`
  int num_controls;
  int observation_size;
  int substeps;       // physics steps of a control step
  int action_repeat;  // control steps of a step
  int episode_steps;  // control steps of an episode
  int settle_steps;   // physics steps between the initial pose and the first observation
  bool runge_kutta;   // the integrator cannot be split into step1 and step2
  Autoreset autoreset;
};

// Where one call writes, all for N environments.
template <typename T>
struct Outputs {
  T* observation;        // [N, observation_size]
  T* final_observation;  // the same, of the episodes that ended in this call; kSameStep only
  double* reward;        // [N]
  bool* truncated;       // [N]
  bool* diverged;        // [N]
};

class Stepper {
 public:
  Stepper(StepperConfig config, TaskFunctions task);
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Starts new episodes where mask [N] is true, or everywhere if it is null.
  template <typename T>
  void reset(const bool* mask, T* observation);

  // action: [N, num_controls]; previous: [N, observation_size], what the last call observed.
  //
  // An environment whose state MuJoCo calls bad, or whose observation is not finite, has diverged:
  // its episode ends, its observation stays the previous one and its reward counts the control
  // steps before. With kNextStep an environment whose episode ended in the previous call is reset
  // instead of stepped: its action is ignored, its reward is 0.
  template <typename T>
  void step(const T* action, const T* previous, const Outputs<T>& out);

  // Writes what reset or step would have observed.
  template <typename T>
  void observe(T* observation);

  // Control steps of the current episodes, [N]: all that the loop remembers between calls.
  const std::vector<int>& steps() const { return steps_; }
  // steps: [N], each in [0, episode_steps].
  void set_steps(std::vector<int> steps) { steps_ = std::move(steps); }

  int num_threads() const { return pool_.num_threads(); }

 private:
  // Lets a reset function, which knows only addresses, run physics on its environment.
  struct Engine {
    Stepper* stepper;
    int n, thread;
  };
  static std::int64_t forward_engine(std::uint64_t engine);
  static std::int64_t reset_engine(std::uint64_t engine);

  void* data(int n) const { return reinterpret_cast<void*>(config_.data[n]); }
  bool over(int n) const { return steps_[n] >= config_.episode_steps; }
  const void* model(int thread) const;
  void place_parameters(int n, int thread);
  void forward_passive(int n, int thread);
  void reset_one(int n, int thread);
  bool step_one(int n, int thread, double* reward);
  bool bad_state(int n) const;
  void advance(int n, int thread, int substeps);
  template <typename T>
  bool observe_one(int n, int thread, T* observation);

  StepperConfig config_;
  TaskFunctions task_;
  Mujoco mujoco_;
  std::vector<std::vector<double*>> fields_;
  std::vector<Engine> engines_;
  std::vector<int> steps_;       // control steps of the current episode
  std::vector<double> scratch_;  // [threads, observation_size]
  ThreadPool pool_;
};

}  // namespace fastrssm
