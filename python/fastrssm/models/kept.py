"""What acting makes of parameters, kept while they stay as they are."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

V = TypeVar("V")


class Kept(Generic[V]):
    """A value made of the parameters of some modules, and how to tell that they have not changed.

    A change through `.data` shows in no version. Such changes belong to training: calls with
    gradient forget the value.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._found: tuple[_Parts, V | None] | None = None

    def get(
        self,
        owner: nn.Module,
        parts: Callable[[], Sequence[nn.Module]],
        make: Callable[[], V | None],
    ) -> V | None:
        """Return make(), or what it returned before.

        Args:
            owner: the parts are modules of it.
            parts: tells them.
            make: called without gradient.

        Returns:
            None where make() returns it, the parameters are not plain ones, gradients are wanted,
            or torch.compile looks on.
        """
        if torch.compiler.is_compiling() or self.forget_while_learning():
            return None
        found = self._found
        if found is None or not found[0].are_unchanged():
            self._found = found = None
            if (known := _plain_parts(owner, parts())) is not None:
                # a tensor of inference mode would have no version
                with torch.inference_mode(False), torch.no_grad():
                    self._found = found = known, make()
        return None if found is None else found[1]

    def forget_while_learning(self) -> bool:
        """Forget the value if gradients are wanted, and tell whether they are."""
        learning = torch.is_grad_enabled()
        if learning:
            self._found = None
        return learning

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Copy and store nothing of it with the module."""
        return type(self), ()


class _Parts:
    """Modules and parameters at one moment."""

    def __init__(self, dicts: list[dict[str, Any]], parameters: list[Tensor]) -> None:
        self._dicts, self._parameters = dicts, parameters
        self._values = [value for d in dicts for value in d.values()]
        self._addresses = [x.data_ptr() for x in parameters]
        # so that nothing else gets these addresses
        self._storages = [x.untyped_storage() for x in parameters]
        self._versions = [x._version for x in parameters]

    def are_unchanged(self) -> bool:
        values = [value for d in self._dicts for value in d.values()]
        return (
            len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and [x.data_ptr() for x in self._parameters] == self._addresses
            and [x._version for x in self._parameters] == self._versions
        )


def _plain_parts(owner: nn.Module, parts: Sequence[nn.Module]) -> _Parts | None:
    """Look at the parts; None where a parameter has no version or address of its own."""
    modules = [module for part in parts for module in part.modules()]
    parameters = [x for m in modules for x in m._parameters.values() if x is not None]
    if torch._C._are_functorch_transforms_active() or any(
        type(x) is not Parameter or x.is_inference() for x in parameters
    ):
        return None
    dicts: list[dict[str, Any]] = [d for m in modules for d in (m._modules, m._parameters) if d]
    return _Parts([owner._modules, *dicts], [*parameters])
