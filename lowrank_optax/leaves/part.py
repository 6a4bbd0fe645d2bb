"""``Part``: a piece of a bracket, a pytree whose leaves are the arrays in its fields.

Projectors, transports, recoveries and transformations still to be made are parts. As
pytrees they pass through ``jax.jit`` and into the automatic axes of an Explicit mesh
as arguments, and two parts without arrays share a trace if their fields are equal.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self

import jax
import numpy as np
import optax


class Part:
    """A piece of a bracket, not a transformation; subclasses are frozen dataclasses.

    A field is a child in the pytree if it holds arrays: an array, a mapping, or another
    part. Everything else is static: a Python number is a constant of the program, and
    an array (as ``optax.inject_hyperparams`` passes) an argument of it.
    """

    def __init_subclass__(cls, **kwargs: Any):
        """Registers the class as a pytree."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(cls, _flatten, cls._unflatten)

    @classmethod
    def _unflatten(cls, static: Any, children: Any) -> "Part":
        names, values = static
        # Not through the constructor: children may be anything while a tree is mapped.
        part = object.__new__(cls)
        for name, value in (*zip(names, children, strict=True), *values):
            value = value.value if isinstance(value, _Itself) else value
            object.__setattr__(part, name, value)
        object.__setattr__(part, "_children", names)
        return part

    def having(self, **fields: Any) -> Self:
        """Returns a copy with other values in some fields, which nothing checks again.

        The constructor checks what a user wrote. A leaf's own copy is made at every
        trace, of values that have been checked.
        """
        copy = object.__new__(type(self))
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = fields.get(field.name, getattr(self, field.name))
            object.__setattr__(copy, field.name, value)
        return copy

    @property
    def init(self):
        """Raises TypeError: a part has no init of its own, as ``optax.chain`` asks."""
        raise TypeError(
            f"{type(self).__name__} is a part of a low-rank bracket, not a gradient "
            "transformation, so it cannot stand in optax.chain by itself. Expected: "
            "lro.chain(lro.project(projector), *transformations, "
            "lro.backproject(scale)), which is one."
        )

    update = init


def _flatten(part: Any) -> tuple[list[Any], Any]:
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    # Asked of the values once: while a tree is mapped a child may be anything, also a
    # value that would count as static.
    names = part.__dict__.get("_children")
    if names is None:
        names = tuple(name for name, value in fields.items() if _holds_arrays(value))
    children = [(jax.tree_util.GetAttrKey(name), fields[name]) for name in names]
    static = tuple(
        (k, v if isinstance(v, Hashable) else _Itself(v))
        for k, v in fields.items()
        if k not in names
    )
    return children, (names, static)


@dataclasses.dataclass(frozen=True, eq=False)
class _Itself:
    """A value that can change, such as a list: equal to nothing but itself."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _holds_arrays(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | Mapping | Part)


@dataclasses.dataclass(frozen=True, eq=False)
class Made(Part):
    """A transformation that is made where it is used; see ``made``.

    Attributes:
      factory: what makes it.
      arrays: those of its arguments that hold arrays, by name or position.
      static: the other ones, as pairs.
    """

    factory: Callable[..., Any]
    arrays: Mapping[str, Any]
    static: tuple[tuple[str, Any], ...]

    def __call__(self) -> optax.GradientTransformationExtraArgs:
        """Makes the transformation, and those among its arguments."""
        given = {**self.arrays, **dict(self.static)}
        given = {name: transformation(value) for name, value in given.items()}
        # By number: as text, "10" comes before "2".
        positions = sorted((name for name in given if name.isdigit()), key=int)
        named = {name: given[name] for name in given.keys() - set(positions)}
        made = self.factory(*(given[position] for position in positions), **named)
        return optax.with_extra_args_support(made)


def made(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Made:
    """Returns ``factory(*args, **kwargs)``, a transformation, as a part.

    Arrays among the arguments stay leaves of a pytree, where those that a
    transformation has closed over are out of reach: a step with automatic axes, on an
    Explicit mesh, refuses an array that it closes over.
    """
    given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    arrays = {name: value for name, value in given.items() if _holds_arrays(value)}
    static = tuple((k, v) for k, v in given.items() if k not in arrays)
    return Made(factory, arrays, static)


def transformation(value: Any) -> Any:
    """Makes what ``made`` put off; anything else stays."""
    return value() if isinstance(value, Made) else value
