"""The detail bands of a wavelet transform, scaled as the approximation was."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.linalg.limiter import limit_growth
from lowrank_optax.linalg.products import Operand, unit_norm, wide
from lowrank_optax.linalg.wavelet import Bands, WaveletBasis, dwt, idwt, repeat
from lowrank_optax.recovery._protocol import LeafView, Recovered, Recovery

_NORMALIZE = (True, False, "matrix")


@dataclasses.dataclass(frozen=True)
class wavelet_details(Recovery):
    r"""Adds the details of the gradient, divided as the inner optimizer divides.

    With the bands ``A, D_l, ..., D_1`` of the gradient (``lro.wavelet``), the inner
    optimizer's direction N and second moment V of A, ``V^ = V / (1 - b2^t)``::

        w_l    = 1 / (sqrt(V^) + eps)                             [r, n]
        w_j    = every row of w_l repeated 2^(l - j) times, cut to D_j's rows
        E_j    = D_j w_j,   limited to [-clip, clip] if there is a clip
        f      = min(1, growth_limit |N_before| / |N|)            per matrix
        update = scale f idwt(N, E_l, ..., E_1)

    so the update has full rank and the details have no state. ``|N_before|`` is the
    norm of the step before, limited; the first N is not limited, nor the first after
    an N of zero. The factor multiplies the details too: that is why it stands here.

    Without a clip no detail is formed: Haar's details lie inside the ``2^l`` rows that
    share one w, so ``idwt(N, D w) = up(N - w A) + w G``; likewise with every filter
    where w is the same for all rows.

    **Where the rows of a block nearly cancel, A is small and D is not**, and D w has no
    bound: at the first step it is the ratio of two random numbers. The limiter, which
    sees N alone, does not notice. ``clip`` bounds it.

    Args:
      eps: as the inner optimizer's, added to the root.
      b2: its decay of V; None where it does not correct V's bias, as
        ``lro.scale_by_raw_adam``.
      growth_limit: largest ratio of one ``|N|`` to the one before it (1.01 in the
        code); None for no limit and no state. May be traced.
      clip: largest magnitude of a normalized detail; None for no bound (code). A
        direction of Adam's has magnitudes of about 1. May be traced.
      normalize: True divides by the second moment: the inner optimizer's state must
        have ``nu``, or the factors ``row`` and ``col`` of
        ``lro.scale_by_matrix_factored_rms`` (V is their product, without correction
        and eps), or ``col`` alone, of ``lro.scale_by_adam_mini``. "matrix" serves any
        inner optimizer: ``w = |N| / |A|``, one number per matrix (Muon, Lion). False
        adds raw details, ``w = 1``.

    Raises:
      ValueError: if ``normalize`` is unknown; at init, with an accumulation
        (``optax.MultiSteps``) inside the bracket: the details of every micro-batch
        would be a step. Accumulate around the optimizer instead. At update, if the
        projector is not ``lro.wavelet``, or there is no second moment to divide by.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> tx = lro.chain(
      ...     lro.project(lro.wavelet(level=2)),
      ...     optax.scale_by_adam(b2=0.999, eps=1e-8),
      ...     lro.wavelet_details(b2=0.999, eps=1e-8),
      ...     lro.backproject(scale=0.25),
      ... )

    References:
      GWT: Scalable Optimizer State Compression for Large Language Model Training
      (2025), https://arxiv.org/abs/2501.07237
      Chen et al., Fira (2024), https://arxiv.org/abs/2410.01623 (the limiter).

    Differences from the authors' code:
      * V is corrected for its bias, as Optax' Adam does; there the correction of the
        whole update, details included, comes last, which makes details
        ``1 / (1 - b1^t)`` times larger: ten times at the first step.
      * A step without gradient there holds N down for hundreds of steps if it is the
        first: the reset is ours. A matrix whose N is zero gets no details either.
      * Details beside a factored second moment are divided by it; the code adds them
        raw (``normalize=False``).
    """

    eps: float | Array = 1e-8
    b2: float | Array | None = 0.999
    growth_limit: float | Array | None = 1.01
    clip: float | Array | None = None
    normalize: bool | str = True

    accumulates = False

    def __post_init__(self):
        """Checks the choice."""
        _checks.choice("normalize", self.normalize, _NORMALIZE)

    def start(self, matrix: Matrix) -> Any:
        """Returns the norm of the last direction, 0 for none."""
        if self.growth_limit is None:
            return ()
        return jnp.zeros([], jnp.float32)

    def update(
        self, matrix: Matrix, state: Any, view: LeafView, scale: Any
    ) -> tuple[Recovered, Any]:
        """Returns the terms of the update, and the norms."""
        if not isinstance(view.basis, WaveletBasis):
            raise ValueError(
                "lro.wavelet_details completes lro.wavelet; leaf "
                f"{matrix.path!r} has another projector."
            )
        direction, factor = wide(view.direction), scale
        if self.growth_limit is not None:
            norm = self._norm(direction)[..., 0, 0]
            limited, state = limit_growth(norm, 0.0, state, self.growth_limit)
            factor = scale * limited
        if view.basis.level == 0:
            return Recovered(factor * direction), state
        weight = self._weight(matrix, view)
        if self.clip is None and (weight.shape[-2] == 1 or view.basis.is_haar):
            low = factor * (direction - weight * wide(view.projected))
            return Recovered(low, _spread(matrix, view.basis, factor * weight)), state
        formed = self._formed(matrix, view, weight)
        return Recovered(addend=formed.map(lambda x: factor * x)), state

    def _weight(self, matrix: Matrix, view: LeafView) -> Array:
        """Returns w, ``[r, n]`` or with one row or column in place of all."""
        if self.normalize is False:
            return jnp.ones((1, 1), wide(view.direction).dtype)
        if self.normalize == "matrix":
            size = self._norm(wide(view.projected))
            whole = jnp.where(size > 0, size, jnp.inf)  # no A: no details
            return self._norm(wide(view.direction)) / whole
        for group in view.moments:
            if "row" in group and "col" in group:
                row, col = wide(group["row"]), wide(group["col"])
                relative = row / jnp.mean(row, -1, keepdims=True)
                return _inverse(jnp.sqrt(relative[..., None] * col[..., None, :]))
            if "nu" in group:
                return self._adam(wide(group["nu"]), view.count)
            if "col" in group:
                return self._adam(wide(group["col"])[..., None, :], view.count)
        raise ValueError(
            "wavelet_details divides by the second moment of the inner optimizer, and "
            f"the state of leaf {matrix.path!r} has none (no field `nu` or `col`). Use "
            'normalize="matrix" (any inner optimizer, such as Muon or Lion), or '
            "normalize=False for raw details."
        )

    def _norm(self, x: Array) -> Array:
        """Returns Frobenius norms ``[..., 1, 1]``.

        What was divided by a second moment has elements near 1; else any magnitude may
        come, and a pass more is needed.
        """
        if self.normalize is not True:
            return unit_norm(x)[1][..., None, None]
        return jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))

    def _adam(self, second: Array, count: Array) -> Array:
        if self.b2 is not None:
            # V has seen the gradient of this step; the count has not.
            second = second / weight_seen(self.b2, count.astype(jnp.float32) + 1.0)
        return _inverse(jnp.sqrt(second) + self.eps)

    def _formed(self, matrix: Matrix, view: LeafView, weight: Array) -> Operand:
        """Returns ``idwt(N, E_l, ..., E_1)``, its details formed one by one."""
        gradient = view.gradient.map(wide)
        axis, level, wavelet = gradient.axis, view.basis.level, view.basis.wavelet
        bands = dwt(gradient.stored, level, wavelet, axis)
        weight, details = gradient.along(weight), []
        for j, detail in enumerate(bands.details):
            if weight.shape[axis] == 1:
                scaled = detail * weight
            else:
                # Coarsest first: a weight serves 2^j rows of the j-th detail.
                scaled = detail * repeat(weight, detail.shape[axis], j, axis)
            if self.clip is not None:
                scaled = jnp.clip(scaled, -self.clip, self.clip)
            details.append(scaled)
        direction = gradient.along(wide(view.direction))
        bands = Bands(direction, tuple(details))
        return gradient.map(lambda _: idwt(bands, matrix.m, wavelet, axis))


def _spread(matrix: Matrix, basis: WaveletBasis, weight: Array) -> Array:
    """Returns a weight for every row of the gradient."""
    if weight.shape[-2] == 1:
        return weight
    rows = Operand.of(weight, matrix.transposed)
    return rows.map(lambda w: repeat(w, matrix.m, basis.level, rows.axis)).array


def _inverse(x: Array) -> Array:
    """Returns ``1 / x``, finite for 0."""
    return 1.0 / jnp.maximum(x, jnp.finfo(x.dtype).tiny)
