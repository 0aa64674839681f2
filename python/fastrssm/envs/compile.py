"""How a task function over a `Physics` becomes a C function that the stepping loop calls.

To numba a `Physics` is one pointer, to the addresses of its arrays; an array is made where it is
read. The tuple of all of them would take seconds to compile.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils
from numba.extending import (
    intrinsic,
    make_attribute_wrapper,
    models,
    overload_attribute,
    register_model,
)

from fastrssm.envs.physics import RNG_WORDS, Physics

_DOUBLES = types.CPointer(types.float64)
_FIELDS = types.CPointer(_DOUBLES)


class _PhysicsType(types.Type):
    """A `Physics` whose arrays have the given shapes."""

    def __init__(self, shapes: Physics) -> None:
        self.shapes = shapes
        super().__init__(name=f"Physics{tuple(shapes)}")


@register_model(_PhysicsType)
class _PhysicsModel(models.StructModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, [("addresses", _FIELDS)])


make_attribute_wrapper(_PhysicsType, "addresses", "addresses")


def _define_attribute(place: int, name: str) -> None:
    @overload_attribute(_PhysicsType, name)
    def attribute(physics: Any) -> Callable[..., Any]:
        shape = getattr(physics.shapes, name)

        # numba wants both signatures alike, annotations included
        def read(physics: Any) -> Any:
            return carray(physics.addresses[place], shape)

        return read


for _place, _name in enumerate(Physics._fields):
    _define_attribute(_place, _name)


@cache
def _view(shapes: Physics) -> Any:
    """Make the compiled function from addresses to a `Physics`."""
    kind = _PhysicsType(shapes)

    @intrinsic
    def view(typing_context: Any, addresses: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            struct = cgutils.create_struct_proxy(kind)(context, builder)
            struct.addresses = arguments[0]
            return struct._getvalue()  # noqa: SLF001

        return kind(_FIELDS), generate

    return view


@cache
def compile_function(role: str, function: Any, shapes: Physics, width: int) -> Any:
    """Compile a function of a task to a C function over the addresses of a `Physics`.

    Args:
        role: "reset": njit (physics, rng) writes the initial pose, and it alone may call `forward`
            and `reset_data`; "observe": njit (physics, out) writes the concatenated sensors, out
            [width]; "reward": njit (physics) -> reward of one control step; "finish": njit
            (physics, total) -> reward of the whole step.
        function: the function.
        shapes: the shape of each array of `Physics`.
        width: of an observation.

    Returns:
        The C function; `.address` is what C++ calls. It lives as long as the process.
    """
    view = _view(shapes)
    match role:
        case "reset":

            @numba.cfunc(types.void(_FIELDS, types.CPointer(types.uint32)))
            def reset(p: Any, rng: Any) -> None:
                function(view(p), carray(rng, (RNG_WORDS,)))

            return reset
        case "observe":

            @numba.cfunc(types.void(_FIELDS, _DOUBLES))
            def observe(p: Any, out: Any) -> None:
                function(view(p), carray(out, (width,)))

            return observe
        case "reward":

            @numba.cfunc(types.float64(_FIELDS))
            def reward(p: Any) -> float:
                return function(view(p))

            return reward
        case _:

            @numba.cfunc(types.float64(_FIELDS, types.float64))
            def finish(p: Any, total: float) -> float:
                return function(view(p), total)

            return finish
