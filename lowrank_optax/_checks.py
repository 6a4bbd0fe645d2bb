"""Argument checks: what was expected, what came, how to mend it."""

import numbers
from collections.abc import Callable, Collection
from typing import Any, TypeGuard

import jax
import optax

_STATIC_HINT = (
    "It fixes array shapes or the program itself, so it must be a plain Python "
    "value. With optax.inject_hyperparams, pass static_args=lro.static_args(fn)."
)


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether something that may be a function or a tree is a function.

    A module is a tree, though it can be called: a tree like the parameters, such as a
    mask made from them, is a module where they are one.
    """
    if not callable(value):
        return False
    partial = isinstance(value, jax.tree_util.Partial) or hasattr(value, "__func__")
    return partial or jax.tree_util.all_leaves([value])


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """Returns ``value`` if it is a Python int of at least 1 (or ``least``).

    Args:
      name: the argument's name, for the message.
      value: what the caller passed.
      least: the smallest that is allowed.

    Returns:
      ``value``, unchanged.

    Raises:
      TypeError: if it is not an int (bools, floats and arrays included).
      ValueError: if it is below ``least``.
    """
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        raise TypeError(
            f"`{name}` must be {'a positive' if least else 'an'} int, got {value!r} "
            f"of type str. Write it without quotes: {name}={value.strip()}."
        )
    if callable(value) and not isinstance(value, type):
        raise TypeError(
            f"`{name}` must be {'a positive' if least else 'an'} int, got a function: "
            "a number that fixes array shapes or the program itself has no schedule."
        )
    # Python counts True as an int. NumPy's integers are Integral and pass.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be {'a positive' if least else 'an'} int, got {value!r} "
            f"of type {type(value).__name__}. {_STATIC_HINT}"
        )
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return int(value)


def rank(value: Any) -> Any:
    """Checks a rank: an int >= 1, a fraction in (0, 1], or a callable of the path."""
    if isinstance(value, float):
        if not 0.0 < value <= 1.0:
            raise ValueError(
                "`rank` given as a float is a fraction of min(m, n) and must lie in "
                f"(0, 1], got {value}. Pass an int for an absolute rank."
            )
        return value
    if callable(value):
        return value
    return positive_int("rank", value)


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """Returns ``value`` if it is one of ``allowed``, else raises ValueError."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"`{name}` must be one of {options}; got {value!r}.")
    return value


def transformation(name: str, value: Any, example: str) -> Any:
    """Returns ``value`` if it is an Optax transformation, else raises TypeError."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation such as "
            f"optax.{example}, got {type(value).__name__}."
        )
    return value
