#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "env/stepper.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// How the compiled task functions and arrays come in: addresses, by name.
using Addresses = std::map<std::string, std::uint64_t>;

class StepperFace {
 public:
  StepperFace(fastrssm::StepperConfig config, const Addresses& task)
      : num_envs_(static_cast<py::ssize_t>(config.data.size())),
        num_controls_(config.num_controls),
        observation_size_(config.observation_size),
        stepper_(std::move(config), functions(task)) {}

  template <typename T>
  void reset(Array<T> observation) {
    check(observation, "observation", observation_size_);
    T* out = observation.mutable_data();
    py::gil_scoped_release release;
    stepper_.reset(out);
  }

  template <typename T>
  void step(Array<T> action, Array<T> observation, Array<double> reward, Array<bool> truncated) {
    check(action, "action", num_controls_);
    check(observation, "observation", observation_size_);
    check(reward, "reward", 1);
    check(truncated, "truncated", 1);
    const T* in = action.data();
    for (py::ssize_t i = 0; i < action.size(); ++i) {
      if (std::isnan(in[i])) {
        throw py::value_error("action[" + std::to_string(i / num_controls_) + "] is NaN");
      }
    }
    T* out = observation.mutable_data();
    double* rewards = reward.mutable_data();
    bool* ends = truncated.mutable_data();
    int diverged = -1;
    {
      py::gil_scoped_release release;
      diverged = stepper_.step(in, out, rewards, ends);
    }
    if (diverged >= 0) {
      throw std::runtime_error("the physics of environment " + std::to_string(diverged) +
                               " diverged: its observation is not finite; reset the environments");
    }
  }

  const std::vector<int>& steps() const { return stepper_.steps(); }

  void set_steps(std::vector<int> steps) {
    if (static_cast<py::ssize_t>(steps.size()) != num_envs_) {
      throw py::value_error("steps has " + std::to_string(steps.size()) + " elements, expected " +
                            std::to_string(num_envs_));
    }
    stepper_.set_steps(std::move(steps));
  }

  int num_threads() const { return stepper_.num_threads(); }

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
  void check(const Array<T>& array, const char* name, py::ssize_t width) const {
    if (array.size() != num_envs_ * width) {
      throw py::value_error(std::string(name) + " has " + std::to_string(array.size()) +
                            " elements, expected " + std::to_string(num_envs_ * width));
    }
  }

  py::ssize_t num_envs_, num_controls_, observation_size_;
  fastrssm::Stepper stepper_;
};

}  // namespace

PYBIND11_MODULE(_stepper, m) {
  m.doc() = "Vectorised MuJoCo stepping; addresses in, arrays filled in place.";
  py::class_<fastrssm::StepperConfig>(m, "StepperConfig")
      .def(py::init<>())
      .def_readwrite("library", &fastrssm::StepperConfig::library)
      .def_readwrite("model", &fastrssm::StepperConfig::model)
      .def_readwrite("passive_model", &fastrssm::StepperConfig::passive_model)
      .def_readwrite("data", &fastrssm::StepperConfig::data)
      .def_readwrite("fields", &fastrssm::StepperConfig::fields)
      .def_readwrite("rng", &fastrssm::StepperConfig::rng)
      .def_readwrite("ctrl_field", &fastrssm::StepperConfig::ctrl_field)
      .def_readwrite("num_controls", &fastrssm::StepperConfig::num_controls)
      .def_readwrite("observation_size", &fastrssm::StepperConfig::observation_size)
      .def_readwrite("substeps", &fastrssm::StepperConfig::substeps)
      .def_readwrite("action_repeat", &fastrssm::StepperConfig::action_repeat)
      .def_readwrite("episode_steps", &fastrssm::StepperConfig::episode_steps)
      .def_readwrite("settle_steps", &fastrssm::StepperConfig::settle_steps)
      .def_readwrite("runge_kutta", &fastrssm::StepperConfig::runge_kutta)
      .def_readwrite("num_threads", &fastrssm::StepperConfig::num_threads);
  py::class_<StepperFace>(m, "Stepper")
      .def(py::init<fastrssm::StepperConfig, const Addresses&>(), py::arg("config"),
           py::arg("task"))
      .def("reset", &StepperFace::reset<float>, py::arg("observation").noconvert())
      .def("reset", &StepperFace::reset<double>, py::arg("observation").noconvert())
      .def("step", &StepperFace::step<float>, py::arg("action").noconvert(),
           py::arg("observation").noconvert(), py::arg("reward").noconvert(),
           py::arg("truncated").noconvert())
      .def("step", &StepperFace::step<double>, py::arg("action").noconvert(),
           py::arg("observation").noconvert(), py::arg("reward").noconvert(),
           py::arg("truncated").noconvert())
      .def_property("steps", &StepperFace::steps, &StepperFace::set_steps)
      .def_property_readonly("num_threads", &StepperFace::num_threads);
}
