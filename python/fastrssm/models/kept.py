"""What acting makes of parameters, kept while they stay as they are."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Generic, Self, TypeVar

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
            modules = _Parts(owner, parts())
            # a tensor of inference mode would have no version
            with torch.inference_mode(False), torch.no_grad():
                value = make() if modules.are_plain() else None
            self._found = found = modules, value
        return found[1]

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

    def __init__(self, owner: nn.Module, parts: Sequence[nn.Module]) -> None:
        modules = [module for part in parts for module in part.modules()]
        dicts = [d for m in modules for d in (m._modules, m._parameters) if d]
        self._dicts = [owner._modules, *dicts]
        self._values = [value for d in self._dicts for value in d.values()]
        self._parameters = [x for x in self._values if isinstance(x, Tensor)]
        self._addresses = [x.data_ptr() for x in self._parameters]
        # so that nothing else gets these addresses
        self._storages = [x.untyped_storage() for x in self._parameters]
        self._versions = self._seen_versions()

    def _seen_versions(self) -> list[int]:
        return [x._version for x in self._parameters]

    def are_plain(self) -> bool:
        return not torch._C._are_functorch_transforms_active() and all(
            type(x) is Parameter and not x.is_inference() for x in self._parameters
        )

    def are_unchanged(self) -> bool:
        values = [value for d in self._dicts for value in d.values()]
        return (
            len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and [x.data_ptr() for x in self._parameters] == self._addresses
            and self._seen_versions() == self._versions
        )
