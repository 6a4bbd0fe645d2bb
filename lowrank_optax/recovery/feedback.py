"""Error feedback: what a step left out comes back with the next gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.products import Operand, has_square, wide
from lowrank_optax.recovery._protocol import LeafView, Recovered, Recovery


@dataclasses.dataclass(frozen=True)
class error_feedback(Recovery):
    r"""LDAdam's generalized error feedback.

    The bracket works on ``A = G + E`` in place of the gradient. With ``R = P^T A``,
    the first moment ``m`` before the step in the old basis ``P_old`` and ``C m`` after
    transport::

        E <- A - P R + b1 / (1 - b1) (P_old m - P C m)

    The first part is what the projection of the gradient left out, the second what the
    change of basis took from the momentum, in the units of a gradient. A momentum that
    is a sum (``trace``) loses ``b1`` times that difference instead.

    **The price is memory**: E has as many elements as the parameter, ``m n`` besides
    the bracket's ``m r + 2 n r``; ``lro.state_bytes`` lists it as "recovery". Stored
    like the parameter, so ``lro.state_shardings`` gives it the parameter's sharding.
    Entries whose squares could not be summed keep their old value.

    Args:
      b1: decay of the inner optimizer's first moment.
      dtype: storage dtype of E, None for the parameter's.
      momentum: include the second part; needs a stored basis, moments that are moved
        along with it, and ``mu`` or ``trace`` in the inner state.

    Raises:
      ValueError: at init, with an accumulation (``optax.MultiSteps``) inside the
        bracket, whose micro-batches would all leave something out (accumulate around
        the optimizer instead); at update, if ``momentum`` lacks one of the above.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> tx = lro.chain(
      ...     lro.project(lro.power_iteration(rank=4), transport=lro.rotate_moments()),
      ...     optax.scale_by_adam(),
      ...     lro.error_feedback(b1=0.9),
      ...     lro.backproject(),
      ... )

    References:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient
      Statistics (2024), https://arxiv.org/abs/2410.16103

    Differences from the authors' code:
      * E is a state of its own there too, but hidden in the parameter's ``.grad``,
        where clearing, clipping or rescaling gradients changes it.
    """

    b1: float | Array = 0.908
    dtype: Any = None
    momentum: bool = True

    accumulates = False
    like_leaf = True

    def start(self, matrix: Matrix) -> Array:
        """Starts with nothing left out."""
        return jnp.zeros(matrix.shape, self.dtype or jnp.float32)

    def stored_as(self, dtype: Any) -> Recovery:
        """Returns the recovery that stores E in ``dtype``, or as told."""
        if self.dtype is not None:
            return self
        return self.having(dtype=dtype)

    def enter(self, state: Operand, gradient: Operand) -> Operand:
        """Returns ``A = G + E``."""
        # In float32: a bfloat16 sum would lose an E that is small beside G.
        return gradient.map(lambda g, e: wide(g) + wide(e), state)

    def update(
        self, matrix: Matrix, state: Operand, view: LeafView, scale: Any
    ) -> tuple[Recovered, Operand]:
        """Returns the direction as it is, and the new E."""
        # E = A + d P_old m - P (R + d C m), with d the momentum's factor
        taken, returned = view.projected, None
        if self.momentum:
            before, carried = self._lost(matrix, view)
            taken = taken + carried
            returned = view.up(view.previous_basis, before)
        error = view.gradient.map(jnp.subtract, view.up(view.basis, taken))
        if returned is not None:
            error = error.map(jnp.add, returned)

        def kept(new: Array, old: Array) -> Array:
            # Rounded first: a finite float32 may be infinite in a narrower dtype.
            new = new.astype(old.dtype)
            # Without a square it would be too much at every step from now on.
            return jnp.where(has_square(new), new, old)

        return Recovered(scale * view.direction), error.map(kept, state)

    def _lost(self, matrix: Matrix, view: LeafView) -> tuple[Array, Array]:
        """Returns the old momentum, before and after transport, as gradients."""
        decays = {"mu": self.b1 / (1.0 - self.b1), "trace": self.b1}
        pairs = zip(view.previous_moments, view.carried_moments, strict=True)
        for before, carried in pairs:
            for field, decay in decays.items():
                if field in before and jax.tree.leaves(view.previous_basis):
                    return decay * before[field], decay * carried[field]
        raise ValueError(
            f"error_feedback(momentum=True) needs the momentum of leaf {matrix.path!r}:"
            " an inner optimizer with `mu` or `trace` in its state, and a projector "
            "that stores its basis. Use momentum=False without them."
        )
