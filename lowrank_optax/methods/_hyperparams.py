"""Which arguments of a method are static under ``optax.inject_hyperparams``."""

import inspect
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array

_NUMERIC = (
    optax.ScalarOrSchedule,
    optax.ScalarOrSchedule | None,
    float | Array,
    float | Array | None,
)


def static_args(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a method's arguments that are not numbers to tune.

    ``optax.inject_hyperparams`` turns every number it is not told about into an
    array, ranks included, and every callable into a schedule.

    Args:
      fn: a method of this library, such as ``lro.galore``.

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
    """
    parameters = inspect.signature(fn).parameters.values()
    return tuple(p.name for p in parameters if p.annotation not in _NUMERIC)
