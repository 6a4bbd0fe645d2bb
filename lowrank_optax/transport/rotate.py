"""Moments turned into the coordinates of the new basis."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.moments import Group, weight_seen
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.linalg.products import wide
from lowrank_optax.transport._protocol import Transport, typical

# A share of a unit vector, lost to float32's rounding of a basis and a product.
_ROUNDING = 1e-5

_FORMS = ("bounded", "debiased", "paper", "root")


@dataclasses.dataclass(frozen=True)
class rotate_moments(Transport):
    r"""Rotates first and second moments by ``C = P_new^T P_old``.

    With ``t`` updates seen, ``m^ = mu / (1 - b1^t)`` and ``v^ = nu / (1 - b2^t)``,
    entrywise squares ``C2 = C * C``::

        mu    <- C mu                 (and the same for trace and ema)
        nu    <- (1 - b2^t) |C2 (v^ - m^ * m^) + (C m^) * (C m^)|      "debiased"
        nu    <- (1 - b2^t) |C2 (nu - mu * mu) + (C mu) * (C mu)|      "paper"
        nu    <- (C sqrt(nu)) * (C sqrt(nu))                           "root"

    ``v^ - m^ m^`` is a variance, and variances of independent coordinates rotate
    with the squares. Where a state has ``nu`` but no ``mu``, ``nu <- C2 nu``.

    The default, "bounded", is "debiased" with two things put right::

        f     =  (1 - sum_j C2_ij) (mean_j sqrt(v^_jk))^2
        s     =  (C m^) * (C m^)
        nu    <- (1 - b2^t) max(C2 (v^ - m^ * m^) + s + f, s)

    Both moments are of one gradient, and ``E x^2 >= (E x)^2``. Where the gradient has
    grown, ``m^ m^`` is above the longer average v^, the difference crosses zero, and
    Adam divides by what is left of it: entries of its direction near 20. The floor
    keeps them at 1. And where the old basis held only a share ``sum_j C2_ij`` of a new
    vector, nothing is known of the rest; zero would be a claim that nothing is there,
    and under a bias correction that is long over a step several times too large. So
    the rest counts as what the column's other coordinates have. The mean is one of
    roots: new vectors come from the weak end of the spectrum, where the mean of squares
    would hold them down.

    Args:
      b1: decay of the first moment in the inner optimizer.
      b2: decay of its second moment.
      form: "bounded" (default) leaves a motionless basis without effect, but for
        entries whose m^ m^ is above v^; "debiased" is LDAdam's as released; "paper" is
        SubTrack++'s formula as printed, which applies the correction twice and makes
        the next steps several times too large; "root" is COAP's, which treats the roots
        as a vector although they have no sign. To turn nothing, take
        ``lro.align_signs`` (the basis' signs follow the old one) or
        ``lro.keep_moments``.

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
    form: str = "bounded"

    moves = True

    def __post_init__(self):
        """Checks the form."""
        _checks.choice("form", self.form, _FORMS)

    def move(
        self, moments: tuple[Group, ...], rotation: Rotation, count: Array
    ) -> tuple[Group, ...]:
        """Rotates every group of moments of one matrix."""
        return tuple(self._move(group, rotation, count) for group in moments)

    def _move(self, group: Group, rotation: Rotation, count: Array) -> Group:
        old = {field: wide(group[field]) for field in group}
        moved = {
            field: rotation.apply(old[field])
            for field in ("trace", "ema")
            if field in group
        }
        # C = D + O with D the diagonal; `mixed` is O mu, which nu needs by itself.
        mixed = rotation.apply_rest(old["mu"]) if "mu" in group else None
        if mixed is not None:
            moved["mu"] = rotation.diagonal(mixed) * old["mu"] + mixed
        if "nu" in group:
            moved["nu"] = self._second(old, mixed, rotation, count)
        # A refresh is one branch of two, which have to agree in every dtype.
        return {field: moved[field].astype(group[field].dtype) for field in group}

    def _second(
        self, old: Group, mixed: Array | None, rotation: Rotation, count: Array
    ) -> Array:
        """Returns nu; ``mixed`` is ``O mu``, O being C without its diagonal."""
        nu, filled = old["nu"], self.form == "bounded"
        if self.form == "root":
            return jnp.square(rotation.apply(jnp.sqrt(nu)))
        if mixed is None:
            rest = _unknown(rotation, nu) if filled else 0.0
            return rotation.squared().apply(nu) + rest
        # Moments that have seen no step are zero, and would be divided by zero.
        steps = jnp.maximum(count, 1).astype(nu.dtype)
        seen1, seen2 = weight_seen(self.b1, steps), weight_seen(self.b2, steps)
        mu = old["mu"]
        if self.form != "paper":
            mu, nu, mixed = mu / seen1, nu / seen2, mixed / seen1
        moved = _second_moment(rotation, mu, nu, mixed)
        if not filled:
            return seen2 * jnp.abs(moved)
        mean = rotation.diagonal(mu) * mu + mixed
        least = jnp.square(mean)
        return seen2 * jnp.maximum(moved + _unknown(rotation, nu), least)


def _unknown(rotation: Rotation, nu: Array) -> Array:
    """Returns f: what the part of a new vector that no old one held may be thought."""
    lost = jnp.maximum(1.0 - rotation.squared().apply(jnp.ones_like(nu)), 0.0)
    # Of vectors that moved within the old basis nothing is lost but rounding.
    return jnp.where(lost > _ROUNDING, lost, 0.0) * typical(nu, rotation)


def _second_moment(rotation: Rotation, mu: Array, nu: Array, mixed: Array) -> Array:
    """Returns ``C2 (nu - mu * mu) + (C mu) * (C mu)``.

    The squares of mu on the diagonal cancel, and nu may be far smaller: with
    ``C = D + O``, D the diagonal, it is ``D2 nu + O2 (nu - mu * mu) + 2 D mu * (O mu) +
    (O mu) * (O mu)``; ``mixed`` is ``O mu``.
    """
    squared, stays = rotation.squared(), rotation.diagonal(mu)
    spread = squared.apply_rest(nu - mu**2)
    return stays**2 * nu + spread + (2.0 * stays * mu + mixed) * mixed
