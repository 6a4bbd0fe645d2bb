"""``static_args``: which arguments ``optax.inject_hyperparams`` must leave alone."""

import functools
import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from lowrank_optax.methods._registry import METHODS

# A learning rate is a number to tune, whatever its annotation says.
_RATE = re.compile(r"(^|_)(lr|learning_rate|step_size)(_|$)")
# Words in the name of an argument that fixes a shape or the program, for arguments that
# say nothing else of themselves: `num_layers=4`, `warmup_steps`, `mask=None`.
_FIXED_WORDS = frozenset(
    "rank ranks gap level levels axis axes seed size sizes step steps every freq "
    "frequency interval period num number n k count dim dims width heads layers iters "
    "iterations blocks block group groups bits fn func function mask filter select "
    "dtype labels init".split()
)
# What an annotation that cannot be evaluated may say of a number.
_NUMBER_WORDS = re.compile(r"\b(float|complex|ArrayLike|Array|Scalar|Numeric|Schedule)")
_NOTHING = (inspect.Parameter.empty, Any, object)


def static_args(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a function's arguments that are not numbers to tune.

    ``optax.inject_hyperparams`` turns every number it is not told about into an
    array, ranks included, and every callable into a schedule.

    Args:
      fn: a method of this library, such as ``lro.galore``, or a factory of your own.
        A learning rate is never static. Nor is what is annotated as ``float``, an
        array or a schedule, alone or in a union, unless its name is one that fixes
        shapes in this library, such as ``rank``. Without annotation the default
        decides, and then the name: ``momentum=0`` is a number to tune,
        ``update_every=4`` is not.

    Returns:
      The names for ``static_args``.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> "rank" in lro.static_args(lro.galore), "scale" in lro.static_args(lro.galore)
      (True, False)
      >>> make = optax.inject_hyperparams(
      ...     lro.galore, static_args=lro.static_args(lro.galore)
      ... )
      >>> tx = make(learning_rate=1e-3, rank=8)
      >>> def own(lr, rank=8, decay=0):
      ...     return lro.galore(lr, rank=rank, weight_decay=decay)
      >>> lro.static_args(own)
      ('rank',)
    """
    return tuple(
        p.name for p in _parameters(fn) if not _is_tuned(p.name, p.annotation, p)
    )


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns a function's parameters with the annotations that can be evaluated."""
    try:
        return [*inspect.signature(fn, eval_str=True).parameters.values()]
    except Exception:  # one annotation's failure (any error) must not hide the others
        found = inspect.signature(fn).parameters.values()
    inner: Any = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    names = getattr(inspect.unwrap(inner), "__globals__", {})

    def read(p: inspect.Parameter) -> inspect.Parameter:
        try:
            return p.replace(annotation=eval(p.annotation, names))
        except Exception:  # what is imported for type checkers alone, mostly
            return p

    return [read(p) if isinstance(p.annotation, str) else p for p in found]


@functools.cache
def _own_names() -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Names that the methods give to sizes, to other static arguments, to numbers."""
    sizes, static, numeric = set(), set(), set()
    for method in METHODS.values():
        for p in inspect.signature(method.factory).parameters.values():
            if p.name == "rank" or int in _members(p.annotation):
                sizes.add(p.name)
            else:
                kind = numeric if _is_number(p.annotation) else static
                kind.add(p.name)
    return frozenset(sizes), frozenset(static), frozenset(numeric)


def _is_tuned(name: str, hint: Any, parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    sizes, static, numeric = _own_names()
    default = None if parameter.default is parameter.empty else parameter.default
    fixed = not _FIXED_WORDS.isdisjoint(name.split("_"))
    if _RATE.search(name) and not isinstance(default, bool | str):
        return True
    # A choice by name stays one, even where a number may stand in its place.
    if name in sizes or isinstance(default, bool | str | type):
        return False
    if hint not in _NOTHING:
        # A function of one array may be a schedule or a filter; the name says which.
        if not _is_number(hint):
            return False
        return not (fixed and _has_int_or_function(hint))
    if isinstance(default, float | complex | np.inexact | np.ndarray | jax.Array):
        return True
    if name in numeric or (callable(default) and "schedule" in name):
        return True
    if callable(default) or name in static:
        return False
    # An int, None, or no default: a number, if the name does not tell otherwise.
    return not fixed


def _members(hint: Any) -> list[Any]:
    """Returns the types of a union, with aliases and ``Annotated`` opened."""
    if isinstance(hint, typing.TypeVar):
        return _members(hint.__bound__) if hint.__bound__ else [*hint.__constraints__]
    for wrapped in ("__supertype__", "__value__"):  # NewType, `type X = ...`
        if hasattr(hint, wrapped) and not inspect.isfunction(hint):
            return _members(getattr(hint, wrapped))
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(hint) for m in _members(arg)]
    return [hint]


def _is_number(hint: Any) -> bool:
    """Whether an annotation allows a number that is no int, an array, or a schedule."""
    return any(_is_one_number(member) for member in _members(hint))


def _is_one_number(hint: Any) -> bool:
    if isinstance(hint, str):
        return bool(_NUMBER_WORDS.search(hint))
    if isinstance(hint, typing.ForwardRef):
        return bool(_NUMBER_WORDS.search(hint.__forward_arg__))
    if _is_function(hint):
        return _is_schedule(hint)
    kind = typing.get_origin(hint) or hint
    if not isinstance(kind, type):
        return False
    # `Float[Array, ""]` of jaxtyping is a class that names the array it is about.
    kind = getattr(kind, "array_type", kind)
    if not isinstance(kind, type):
        return kind is Any
    if kind in (numbers.Number, numbers.Complex, numbers.Real, np.number):
        return True
    kinds = (float, complex, np.inexact, np.ndarray, jax.Array)
    return issubclass(kind, (*kinds, optax.schedules.StatefulSchedule))


def _is_function(hint: Any) -> bool:
    return typing.get_origin(hint) is Callable or hint in (Callable, typing.Callable)


def _is_schedule(hint: Any) -> bool:
    """Whether a function type is of one number that gives a number."""
    arguments = typing.get_args(hint)
    if not arguments or arguments[0] is Ellipsis or len(arguments[0]) != 1:
        return False
    (step,), result = arguments
    return (_is_number(step) or int in _members(step)) and _is_number(result)


def _has_int_or_function(hint: Any) -> bool:
    members = _members(hint)
    return int in members or any(map(_is_function, members))
