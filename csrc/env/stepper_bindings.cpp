#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "env/stepper.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// How the compiled task functions and arrays come in: addresses, by name.
using Addresses = std::map<std::string, std::uint64_t>;

// Runs one job at a time on a thread of its own, so that the caller can do something else.
class Driver {
 public:
  Driver() : thread_([this] { loop(); }) {}
  ~Driver() {
    wait();
    start(nullptr);
    thread_.join();
  }
  void start(std::function<void()> job) {
    job_ = std::move(job);
    busy_.store(true, std::memory_order_release);
    busy_.notify_all();
  }
  void wait() { busy_.wait(true, std::memory_order_acquire); }

 private:
  void loop() {
    for (;;) {
      busy_.wait(false, std::memory_order_acquire);
      if (!job_) return;
      job_();
      busy_.store(false, std::memory_order_release);
      busy_.notify_all();
    }
  }
  std::function<void()> job_;
  std::atomic<bool> busy_{false};
  std::thread thread_;
};

class StepperFace {
 public:
  StepperFace(fastrssm::StepperConfig config, const Addresses& task, py::object owner)
      : owner_(std::move(owner)),
        num_envs_(static_cast<py::ssize_t>(config.data.size())),
        num_controls_(config.num_controls),
        observation_size_(config.observation_size),
        process_(getpid()),
        stepper_(std::make_unique<fastrssm::Stepper>(std::move(config), functions(task))) {}

  ~StepperFace() {
    if (getpid() == process_) return;
    // a forked child has none of the threads, so it cannot end them
    (void)driver_.release();
    (void)stepper_.release();
  }

  template <typename T>
  void reset(const std::optional<Array<bool>>& mask, Array<T> observation) {
    check_process();
    if (mask) check(*mask, "mask", 1);
    check(observation, "observation", observation_size_);
    const bool* where = mask ? mask->data() : nullptr;
    T* out = observation.mutable_data();
    py::gil_scoped_release release;
    stepper_->reset(where, out);
  }

  template <typename T>
  void observe(Array<T> observation) {
    check_process();
    check(observation, "observation", observation_size_);
    T* out = observation.mutable_data();
    py::gil_scoped_release release;
    stepper_->observe(out);
  }

  template <typename T>
  void step(Array<T> action, Array<T> previous, Array<T> observation, Array<T> final_observation,
            Array<double> reward, Array<bool> truncated, Array<bool> diverged) {
    const auto out =
        outputs(action, previous, observation, final_observation, reward, truncated, diverged);
    const T *in = action.data(), *before = previous.data();
    py::gil_scoped_release release;
    stepper_->step(in, before, out);
  }

  // The arrays are kept until the next call.
  template <typename T>
  void start(Array<T> action, Array<T> previous, Array<T> observation, Array<T> final_observation,
             Array<double> reward, Array<bool> truncated, Array<bool> diverged) {
    const auto out =
        outputs(action, previous, observation, final_observation, reward, truncated, diverged);
    const T *in = action.data(), *before = previous.data();
    held_ = py::make_tuple(action, previous, observation, final_observation, reward, truncated,
                           diverged);
    if (!driver_) driver_ = std::make_unique<Driver>();
    driver_->start([this, in, before, out] { stepper_->step(in, before, out); });
  }

  void wait() {
    check_process();
    py::gil_scoped_release release;
    if (driver_) driver_->wait();
  }

  const std::vector<int>& steps() const { return stepper_->steps(); }

  void set_steps(std::vector<int> steps) {
    if (static_cast<py::ssize_t>(steps.size()) != num_envs_) {
      throw py::value_error("steps has " + std::to_string(steps.size()) + " elements, expected " +
                            std::to_string(num_envs_));
    }
    stepper_->set_steps(std::move(steps));
  }

  int num_threads() const { return stepper_->num_threads(); }

 private:
  static fastrssm::TaskFunctions functions(const Addresses& task) {
    fastrssm::TaskFunctions out{};
    out.reset = reinterpret_cast<decltype(out.reset)>(task.at("reset"));
    out.observe = reinterpret_cast<decltype(out.observe)>(task.at("observe"));
    out.reward = reinterpret_cast<decltype(out.reward)>(task.at("reward"));
    out.finish = reinterpret_cast<decltype(out.finish)>(task.at("finish"));
    return out;
  }

  template <typename T>
  fastrssm::Outputs<T> outputs(const Array<T>& action, const Array<T>& previous,
                               Array<T>& observation, Array<T>& final_observation,
                               Array<double>& reward, Array<bool>& truncated,
                               Array<bool>& diverged) const {
    check_process();
    check(action, "action", num_controls_);
    check(previous, "previous", observation_size_);
    check(observation, "observation", observation_size_);
    check(final_observation, "final_observation", observation_size_);
    check(reward, "reward", 1);
    check(truncated, "truncated", 1);
    check(diverged, "diverged", 1);
    const T* in = action.data();
    for (py::ssize_t i = 0; i < action.size(); ++i) {
      if (std::isnan(in[i])) {
        throw py::value_error("actions[" + std::to_string(i / num_controls_) + "] is NaN");
      }
    }
    return {observation.mutable_data(), final_observation.mutable_data(), reward.mutable_data(),
            truncated.mutable_data(), diverged.mutable_data()};
  }

  void check_process() const {
    if (getpid() != process_) {
      throw std::runtime_error(
          "these environments belong to the process that forked this one: make new ones here");
    }
  }

  template <typename T>
  void check(const Array<T>& array, const char* name, py::ssize_t width) const {
    if (array.size() != num_envs_ * width) {
      throw py::value_error(std::string(name) + " has " + std::to_string(array.size()) +
                            " elements, expected " + std::to_string(num_envs_ * width));
    }
  }

  py::object owner_;  // of what the addresses point into, and of the arrays of a step under way:
  py::tuple held_;    // both outlive the threads
  py::ssize_t num_envs_, num_controls_, observation_size_;
  pid_t process_;
  std::unique_ptr<fastrssm::Stepper> stepper_;
  std::unique_ptr<Driver> driver_;  // after the stepper, so that it ends first
};

template <typename T>
void def_steps(py::class_<StepperFace>& stepper) {
  stepper
      .def("reset", &StepperFace::reset<T>, py::arg("mask").noconvert(),
           py::arg("observation").noconvert())
      .def("observe", &StepperFace::observe<T>, py::arg("observation").noconvert());
  const auto def_step = [&](const char* name, auto function) {
    stepper.def(name, function, py::arg("action").noconvert(), py::arg("previous").noconvert(),
                py::arg("observation").noconvert(), py::arg("final_observation").noconvert(),
                py::arg("reward").noconvert(), py::arg("truncated").noconvert(),
                py::arg("diverged").noconvert());
  };
  def_step("step", &StepperFace::step<T>);
  def_step("start", &StepperFace::start<T>);
}

}  // namespace

PYBIND11_MODULE(_stepper, m) {
  using fastrssm::Autoreset, fastrssm::StepperConfig, fastrssm::ThreadModels;
  m.doc() = "Vectorised MuJoCo stepping; addresses in, arrays filled in place.";
  py::enum_<Autoreset>(m, "Autoreset")
      .value("NEXT_STEP", Autoreset::kNextStep)
      .value("SAME_STEP", Autoreset::kSameStep)
      .value("DISABLED", Autoreset::kDisabled);
  py::class_<ThreadModels>(m, "ThreadModels")
      .def(py::init<std::uint64_t, std::uint64_t, std::vector<std::uint64_t>>(), py::arg("model"),
           py::arg("passive"), py::arg("parameters"));
  py::class_<StepperConfig>(m, "StepperConfig")
      .def(py::init<>())
      .def_readwrite("library", &StepperConfig::library)
      .def_readwrite("models", &StepperConfig::models)
      .def_readwrite("data", &StepperConfig::data)
      .def_readwrite("contacts", &StepperConfig::contacts)
      .def_readwrite("warnings", &StepperConfig::warnings)
      .def_readwrite("fields", &StepperConfig::fields)
      .def_readwrite("rng", &StepperConfig::rng)
      .def_readwrite("ctrl_field", &StepperConfig::ctrl_field)
      .def_readwrite("parameters_field", &StepperConfig::parameters_field)
      .def_readwrite("engine_field", &StepperConfig::engine_field)
      .def_readwrite("num_controls", &StepperConfig::num_controls)
      .def_readwrite("observation_size", &StepperConfig::observation_size)
      .def_readwrite("substeps", &StepperConfig::substeps)
      .def_readwrite("action_repeat", &StepperConfig::action_repeat)
      .def_readwrite("episode_steps", &StepperConfig::episode_steps)
      .def_readwrite("settle_steps", &StepperConfig::settle_steps)
      .def_readwrite("runge_kutta", &StepperConfig::runge_kutta)
      .def_readwrite("autoreset", &StepperConfig::autoreset);
  py::class_<StepperFace> stepper(m, "Stepper");
  stepper
      .def(py::init<StepperConfig, const Addresses&, py::object>(), py::arg("config"),
           py::arg("task"), py::arg("owner"))
      .def("wait", &StepperFace::wait)
      .def_property("steps", &StepperFace::steps, &StepperFace::set_steps)
      .def_property_readonly("num_threads", &StepperFace::num_threads);
  def_steps<float>(stepper);
  def_steps<double>(stepper);
}
