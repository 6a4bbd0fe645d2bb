"""A second optimizer for what lies outside the subspace."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.products import Operand, wide
from lowrank_optax.recovery._protocol import LeafView, Recovered, Recovery

# Where G lies in the subspace, G - P R is rounding, and its sign would be a step.
_ROUNDING = 1e-6

# Makes another key of the one that bases are drawn from.
_SALT = 0x47554D


@dataclasses.dataclass(frozen=True)
class complement(Recovery):
    r"""Adds what another transformation makes of the residual.

    With ``R = P^T G`` and the inner optimizer's direction N::

        update = bracket_scale * P N + scale * T(G - P R)

    T sees every projected leaf's residual in the leaf's own shape, and keeps whatever
    state it keeps at that size: a transformation without state, such as a sign, costs
    none. Without a T the residual itself is added, and is then never formed:
    ``P (bracket_scale * N - scale * R) + scale * G``. What T sees is exactly zero where
    it is below 1e-6 of the largest entry of the gradient's column: rounding, of which a
    sign would make a step. T gets no ``params``.

    With a ``probability`` q the residual, which then has no T, is added now and then,
    as in GUM: ``scale (G - P R) / q`` in a share q of the steps, drawn for every matrix
    by itself, and nothing in the others. Its mean over the draws is
    ``scale (G - P R)``. They are a function of the bracket's key, the leaf's path, the
    layer and the step: the same on all replicas and in resumed runs.

    Args:
      transformation: T, a direction without learning rate: ``optax.scale_by_sign()``
        (FRUGAL), ``optax.trace(0.9)``, ...; None for the residual as it is (SUMO).
      scale: factor on T's result. May be traced.
      probability: q, in (0, 1]; None adds the residual at every step. May be traced.

    Raises:
      TypeError: if ``transformation`` is no Optax transformation.
      ValueError: if ``probability`` is out of range or stands beside a
        ``transformation``; at init, with an accumulation (``optax.MultiSteps``) inside
        the bracket: the complement would step at every micro-batch. Accumulate around
        the optimizer instead.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> tx = lro.chain(
      ...     lro.project(lro.power(rank=4)),
      ...     optax.scale_by_adam(),
      ...     lro.complement(optax.scale_by_sign()),
      ...     lro.backproject(),
      ... )

    References:
      Zmushko et al., FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
      for Scalable Training (2024), https://arxiv.org/abs/2411.07837
      Unbiased Gradient Low-Rank Projection (GUM, 2025),
      https://arxiv.org/abs/2510.17802
    """

    transformation: Any = None
    scale: float | Array = 1.0
    probability: float | Array | None = None

    accumulates = False

    def __post_init__(self):
        """Checks the transformation."""
        if self.transformation is not None:
            _checks.transformation(
                "transformation", self.transformation, "scale_by_sign()"
            )
            if self.probability is not None:
                raise ValueError(
                    "`probability` of lro.complement draws the residual as it is; a "
                    "`transformation` sees it at every step. Leave one of them out."
                )
        q = self.probability
        if isinstance(q, int | float) and not 0 < q <= 1:
            raise ValueError(
                f"`probability` of lro.complement must lie in (0, 1], got {q}."
            )

    @property
    def whole(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there is a T."""
        return self.transformation is not None

    def start_whole(self, leaf: Any) -> Any:
        """Returns T's state for a leaf."""
        return self.transformation.init(leaf)

    def update_whole(self, outside: Any, state: Any) -> tuple[Any, Any]:
        """Returns ``scale * T(G - P R)``, and T's state in the dtypes that it had."""
        # A state that came back in another dtype could not be carried by a `lax.scan`.
        direction, new = self.transformation.update(outside, state)
        new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)
        return jax.tree.map(lambda x: self.scale * x, direction), new

    def start(self, matrix: Matrix) -> tuple[()]:
        """Keeps nothing itself."""
        del matrix
        return ()

    def update(
        self, matrix: Matrix, state: Any, view: LeafView, scale: Any
    ) -> tuple[Recovered, Any]:
        """Returns the terms of the update."""
        del matrix
        inside = scale * wide(view.direction)
        if self.transformation is None:
            factor: Any = self.scale
            if self.probability is not None:
                key = jax.random.fold_in(
                    jax.random.fold_in(view.key, _SALT), view.count
                )
                drawn = jax.random.uniform(key) < self.probability
                factor = jnp.where(drawn, factor / self.probability, 0.0)
            low = inside - factor * wide(view.projected)
            return Recovered(low, jnp.full((1, 1), factor, low.dtype)), state
        return Recovered(inside, outside=_residual(view)), state


def _residual(view: LeafView) -> Operand:
    """Returns ``G - P R``, 0 where it is no more than the rounding of G's column."""
    gradient = view.gradient.map(wide)
    lifted = view.up(view.basis, wide(view.projected))
    # Column by column: a column of small entries has less rounding than the matrix.
    least = gradient.along(_ROUNDING * gradient.column_peaks())

    def rest(g: Array, inside: Array) -> Array:
        return jnp.where(jnp.abs(g - inside) > least, g - inside, 0.0)

    return gradient.map(rest, lifted)
