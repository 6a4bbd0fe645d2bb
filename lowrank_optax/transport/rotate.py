"""Moments turned into the coordinates of the new basis."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax._moments import Group
from lowrank_optax.linalg.rotation import Rotation
from lowrank_optax.transport._protocol import Transport


@dataclasses.dataclass(frozen=True)
class rotate_moments(Transport):
    r"""Rotates first and second moments by ``C = P_new^T P_old``.

    With ``t`` updates seen, ``m^ = mu / (1 - b1^t)`` and ``v^ = nu / (1 - b2^t)``,
    entrywise squares ``C2 = C * C``::

        mu    <- C mu                 (and the same for trace and ema)
        nu    <- (1 - b2^t) |C2 (v^ - m^ * m^) + (C m^) * (C m^)|      "debiased"
        nu    <- (1 - b2^t) |C2 (nu - mu * mu) + (C mu) * (C mu)|      "paper"

    ``v^ - m^ m^`` is a variance, and variances of independent coordinates rotate
    with the squares. Where a state has ``nu`` but no ``mu``, ``nu <- C2 nu``.

    Args:
      b1: decay of the first moment in the inner optimizer.
      b2: decay of its second moment.
      form: "debiased" (default) leaves a motionless basis without effect; "paper"
        is SubTrack++'s formula as printed, which applies the correction twice and
        makes the next steps several times too large.

    Raises:
      ValueError: if ``form`` is unknown, or (at init) if the inner optimizer has no
        moments to rotate.

    Examples:
      >>> import lowrank_optax as lro
      >>> transport = lro.rotate_moments(b1=0.9, b2=0.999)
      >>> part = lro.project(lro.power(rank=4), transport=transport)

    References:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient
      Statistics (2024), https://arxiv.org/abs/2410.16103
    """

    b1: float | Array = 0.9
    b2: float | Array = 0.999
    form: str = "debiased"

    moves = True

    def __post_init__(self):
        """Checks the form."""
        _checks.choice("form", self.form, ("debiased", "paper"))

    def move(
        self, moments: tuple[Group, ...], rotation: Rotation, count: Array
    ) -> tuple[Group, ...]:
        """Rotates every group of moments of one matrix."""
        steps = jnp.maximum(count, 1).astype(jnp.float32)
        return tuple(self._move(group, rotation, steps) for group in moments)

    def _move(self, group: Group, rotation: Rotation, steps: Array) -> Group:
        moved = {
            field: rotation.apply(group[field].astype(jnp.float32))
            for field in ("mu", "trace", "ema")
            if field in group
        }
        if "nu" in group:
            seen1, seen2 = 1.0 - self.b1**steps, 1.0 - self.b2**steps
            nu, squared = group["nu"].astype(jnp.float32), rotation.squared()
            if "mu" not in group:
                moved["nu"] = squared.apply(nu)
            else:
                mu, turned = group["mu"].astype(jnp.float32), moved["mu"]
                if self.form == "debiased":
                    mu, turned, nu = mu / seen1, turned / seen1, nu / seen2
                variance = squared.apply(nu - mu**2)
                moved["nu"] = seen2 * jnp.abs(variance + turned**2)
        return {field: moved[field].astype(group[field].dtype) for field in group}
