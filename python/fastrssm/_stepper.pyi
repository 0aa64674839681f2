"""
Vectorised MuJoCo stepping; addresses in, arrays filled in place.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['Stepper', 'StepperConfig']
class StepperConfig:
    library: str
    runge_kutta: bool
    def __init__(self) -> None:
        ...
    @property
    def action_repeat(self) -> int:
        ...
    @action_repeat.setter
    def action_repeat(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def ctrl_field(self) -> int:
        ...
    @ctrl_field.setter
    def ctrl_field(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def data(self) -> list[int]:
        ...
    @data.setter
    def data(self, arg0: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    @property
    def episode_steps(self) -> int:
        ...
    @episode_steps.setter
    def episode_steps(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def fields(self) -> list[list[int]]:
        ...
    @fields.setter
    def fields(self, arg0: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]]) -> None:
        ...
    @property
    def model(self) -> int:
        ...
    @model.setter
    def model(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def num_controls(self) -> int:
        ...
    @num_controls.setter
    def num_controls(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def num_threads(self) -> int:
        ...
    @num_threads.setter
    def num_threads(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def observation_size(self) -> int:
        ...
    @observation_size.setter
    def observation_size(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def passive_model(self) -> int:
        ...
    @passive_model.setter
    def passive_model(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def rng(self) -> list[int]:
        ...
    @rng.setter
    def rng(self, arg0: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    @property
    def settle_steps(self) -> int:
        ...
    @settle_steps.setter
    def settle_steps(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def substeps(self) -> int:
        ...
    @substeps.setter
    def substeps(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class Stepper:
    def __init__(self, config: StepperConfig, task: collections.abc.Mapping[str, typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    @typing.overload
    def reset(self, observation: numpy.typing.NDArray[numpy.float32]) -> None:
        ...
    @typing.overload
    def reset(self, observation: numpy.typing.NDArray[numpy.float64]) -> None:
        ...
    @typing.overload
    def step(self, action: numpy.typing.NDArray[numpy.float32], observation: numpy.typing.NDArray[numpy.float32], reward: numpy.typing.NDArray[numpy.float64], truncated: numpy.typing.NDArray[numpy.bool]) -> None:
        ...
    @typing.overload
    def step(self, action: numpy.typing.NDArray[numpy.float64], observation: numpy.typing.NDArray[numpy.float64], reward: numpy.typing.NDArray[numpy.float64], truncated: numpy.typing.NDArray[numpy.bool]) -> None:
        ...
    @property
    def num_threads(self) -> int:
        ...
