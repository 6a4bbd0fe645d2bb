"""A transformation under test: its parameters, gradients and reference run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.testing._programs import (
    Names,
    Step,
    by_path,
    called_in,
    expressions,
    plain_names,
    whole_step,
)

STEPS = 5


def small_params() -> Any:
    """Returns a tall matrix, a wide one and a vector."""
    return {
        "dense": {"kernel": jnp.ones((12, 6)), "bias": jnp.zeros(6)},
        "out": {"kernel": -jnp.ones((5, 8))},
    }


def gradients_like(params: Any, seed: int) -> Any:
    """Returns standard normal gradients in the parameters' shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A transformation under test, with what its laws share.

    A law compares a wrapped run with the plain one; the plain one is compiled and
    run once.

    Attributes:
      make: builds the transformation. With an argument ``learning_rate`` that has
        a default, ``optax.inject_hyperparams`` is tried on it too.
      params: the parameters, a dictionary; None is two small matrices and a vector.
      gradient_dtype: of all gradients; None is that of their parameters.

    Examples:
      >>> import functools
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.testing import LAWS, Subject
      >>> make = functools.partial(lro.galore, learning_rate=1e-2, rank=2)
      >>> LAWS["chain"](Subject(make))
    """

    make: Callable[..., optax.GradientTransformation]
    params: Any = None
    gradient_dtype: Any = None

    def __post_init__(self):
        """Fills in the parameters."""
        if self.params is None:
            object.__setattr__(self, "params", small_params())

    # A cached property writes into `__dict__`, which a frozen dataclass lets pass.
    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The plain transformation."""
        return optax.with_extra_args_support(self.make())

    @functools.cached_property
    def gradients(self) -> list[Any]:
        """One gradient per step."""
        like = optax.tree.cast(self.params, self.gradient_dtype)
        return [gradients_like(like, seed) for seed in range(STEPS)]

    @functools.cached_property
    def step(self) -> Callable:
        """The plain step, compiled: (params, state, gradient) -> (params, state)."""
        return jax.jit(step_of(self.tx))

    @functools.cached_property
    def run(self) -> list[tuple[Any, Any]]:
        """(params, state) before the first step and after each."""
        return self.trajectory(self.step, self.start[1])

    @functools.cached_property
    def start(self) -> tuple[Any, Any, Any]:
        """(params, state, gradient) of the first step."""
        return self.params, self.tx.init(self.params), self.gradients[0]

    @functools.cached_property
    def written(self) -> list[str]:
        """What the plain step computes: an expression for every leaf it returns."""
        jaxpr = jax.make_jaxpr(whole_step(self.tx))(*self.start)
        return expressions(jaxpr, plain_names(self.start))

    @functools.cached_property
    def guarded(self) -> tuple[Callable, Any]:
        """The step under ``optax.apply_if_finite``, compiled, and its first state."""
        tx = optax.apply_if_finite(self.make(), max_consecutive_errors=3)
        return jax.jit(step_of(tx)), tx.init(self.params)

    def beside(
        self,
        tx: optax.GradientTransformation,
        arguments: Any = None,
        match: Names = by_path,
        without: int | None = None,
    ) -> Step:
        """Returns the step of another transformation beside the plain one.

        Args:
          tx: the other transformation, usually the plain one in a wrapper.
          arguments: its (params, state, gradient); None is the plain ones with its own
            state.
          match: says which of its leaves is which of the plain ones.
          without: a leaf of the parameters that the wrapper takes away.
        """
        if arguments is None:
            arguments = self.params, tx.init(self.params), self.gradients[0]
        ignore = () if without is None else (without,)
        return Step((self.start, self.written), tx, arguments, match, ignore)

    def is_scanned_by(self, scan: Callable, arguments: Any) -> bool:
        """Whether one turn of a ``lax.scan`` is shown to be the plain step.

        Args:
          scan: (params, state, gradients) -> (params, state), the scan and no more.
          arguments: its arguments.
        """
        jaxpr = jax.make_jaxpr(scan)(*arguments)
        turn = expressions(jaxpr, plain_names(self.start), ("jit", "pjit", "scan"))
        return turn == self.written[: len(jax.tree.leaves(self.start[:2]))]

    def is_called_by(self, function: Callable, arguments: Any, name: str) -> bool:
        """Whether what ``function`` calls by a name is shown to be the plain step.

        Args:
          function: calls something of that name under ``jit``, on what takes the place
            of (params, state, gradient).
          arguments: its arguments.
          name: the name.
        """
        jaxpr = jax.make_jaxpr(function)(*arguments)
        called = called_in(jaxpr, name, plain_names(self.start))
        return called == self.written[: len(jax.tree.leaves(self.start[:2]))]

    @property
    def final(self) -> Any:
        """The parameters at the end of the plain run."""
        return self.run[-1][0]

    def trajectory(self, step: Callable, state: Any) -> list[tuple[Any, Any]]:
        """Returns (params, state) before the first step and after each."""
        params, out = self.params, [(self.params, state)]
        for gradient in self.gradients:
            params, state = step(params, state, gradient)
            out.append((params, state))
        return out


def step_of(tx: optax.GradientTransformation) -> Callable:
    """Returns (params, state, gradient) -> (params, state)."""

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step
