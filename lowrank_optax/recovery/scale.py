"""Recovery scaling: the residual steps as far as the subspace (Fira, Alice)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.linalg.limiter import limit_growth
from lowrank_optax.linalg.products import has_square, kept_if, regram, wide
from lowrank_optax.recovery._protocol import LeafView, Recovered, Recovery

# The residual's norm is a difference, of which float32 leaves little below 1e-3.
_ZERO = 1e-3

# Below this share of |G phi|^2 the residual's norm needs P^T P as it is: taking it as
# the identity then costs digits. Above, its error of 1e-6 does not show.
_SMALL = 1e-2

# The largest of some thousand Gaussian numbers has 2.5 to 4 root mean squares: a column
# whose root mean square is this share of the limit for entries just meets that limit.
_SHARE = 0.4


class Energies(NamedTuple):
    """State with ``energy_decay``: of one matrix.

    Attributes:
      energy: running mean of the squared norm of the residual's columns, ``[1, n]``.
      norm: ``|Lambda|`` after limiting, ``()`` without a limit.
    """

    energy: Any
    norm: Any


@dataclasses.dataclass(frozen=True)
class recover_scale(Recovery):
    r"""Adds the residual, scaled as the inner optimizer scaled the projection.

    With ``R = P^T G`` and the inner optimizer's direction ``N``, both ``[r, n]``, for
    every column j of the matrix view (the long side of the matrix by default)::

        phi_j  = |N_j| / (|R_j| + 1e-8)
        phi_j <- min(phi_j, 0.4 entry_limit rms(N_j) / rms(G_j))
        Lambda = (G - P R) diag(phi)                       residual="paper"
        Lambda = (G - scale P R) diag(phi)                 residual="authors"
        Lambda <- Lambda min(1, growth_limit |Lambda_before| / |Lambda|)
        update = scale P N + Lambda

    No residual is formed: ``scale P N + (G - P R) diag(phi) = P (scale N - R diag(phi))
    + G diag(phi)``, and for the limiter ``|Lambda|^2 = sum_j phi_j^2 (|G_j|^2 -
    2 |R_j|^2 + R_j^T (P^T P) R_j)``, in float32. ``P^T P`` counts as the identity
    where the basis is orthonormal up to float32's rounding and Lambda is above a tenth
    of ``|G diag(phi)|``; else it is formed. Where Lambda is a small share s of that,
    its norm is known to about ``1e-8 / s^2``.

    **A ratio of norms has no bound of its own**: a column whose gradient lies almost
    outside the basis has an ``|R_j|`` near zero, and takes a step of as many learning
    rates. So entries of ``G diag(phi)`` are clipped at ``entry_limit`` root mean
    squares of N_j (of N, for one phi per matrix): with Adam's N, a multiple of the
    learning rate at every rank and for every gradient. The second line does the same
    to the column as a whole, so that the limiter has nothing huge to remember; it is
    left out without a growth limit. A column with an R_j of zero has no ratio, and so
    no share.

    **With** ``energy_decay`` (Alice's compensation) the columns' energies over time
    take the place of the ratio, and every column of the residual is brought to entries
    with a root mean square of 1, the size of an entry of Adam's N::

        e_j    = energy_decay e_j + (1 - energy_decay) |(G - P R)_j|^2
        phi_j  = factor sqrt(m - r) / sqrt(e_j / (1 - energy_decay^t))

    A column's step follows its own past, whatever N is, and can grow by
    ``1 / sqrt(1 - energy_decay)`` at once and no more, so it needs neither limit; give
    None for both, or keep them. The state has n more numbers per matrix.

    The state is one float32 per matrix, ``|Lambda|`` after limiting and before entries
    are clipped. The first Lambda
    is not limited. A Lambda below 1e-3 of ``|G diag(phi)|``, where that difference
    loses its digits, or of ``|N|``, counts as zero: the step goes without it, and the
    next one is again a first. So neither a gradient inside the span nor one that
    vanished for a step holds the following ones down.

    Args:
      of: "residual", or "gradient" for APOLLO's rule: the update is
        ``scale G diag(phi)`` and N only sets its size.
      granularity: one phi per "column", or one per matrix: "tensor".
      growth_limit: largest ratio of one ``|Lambda|`` to the one before it (1.01 in
        both papers); None for no limit and no state. May be traced.
      entry_limit: largest entry of ``G diag(phi)``, in root mean squares of N_j. A
        Gaussian column of which the basis sees a fair share reaches 4 (and its root
        mean square 1), so that 10 leaves the paper's ratio alone wherever it means
        anything; None for the papers' form. May be traced.
      residual: "paper", or "authors" for the released codes', which take only the
        scaled part of ``P R`` off the gradient.
      energy_decay: decay of the columns' energies; None for the ratio. May be traced.
      factor: on Lambda, with energies or the ratio. May be traced.
      debias: whether energies are corrected for their start at zero.

    Raises:
      ValueError: if a choice is unknown, or at init if columns are asked for with
        ``side="both"``, where the projection has no column for each of G's.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> tx = lro.chain(
      ...     lro.project(lro.power(rank=4)),
      ...     optax.scale_by_adam(),
      ...     lro.recover_scale(growth_limit=1.01),
      ...     lro.backproject(scale=0.25),
      ... )

    References:
      Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? (2024), https://arxiv.org/abs/2410.01623

    Differences from the authors' code:
      * ``residual="paper"`` is the default; the codes' residual still holds
        ``(1 - scale)`` of the gradient inside the subspace.
      * Their residual is formed, and a step without gradient holds Lambda down for
        hundreds of steps: the reset is ours.
      * Their ratio has no bound: a Gaussian 128 x 2048 gradient at rank 1 takes a first
        step of 3300 learning rates, and a column that the basis does not see one of
        ``1e8 |G_j|``.
    """

    of: str = "residual"
    granularity: str = "column"
    growth_limit: float | Array | None = 1.01
    residual: str = "paper"
    entry_limit: float | Array | None = 10.0
    energy_decay: float | Array | None = None
    factor: float | Array = 1.0
    debias: bool = True

    def __post_init__(self):
        """Checks the choices."""
        _checks.choice("of", self.of, ("residual", "gradient"))
        _checks.choice("granularity", self.granularity, ("column", "tensor"))
        _checks.choice("residual", self.residual, ("paper", "authors"))
        own = (self.of, self.granularity, self.residual)
        if self.energy_decay is not None and own != ("residual", "column", "paper"):
            raise ValueError(
                "recover_scale(energy_decay=...) is of the columns of the paper's "
                f"residual. Leave `of`, `granularity` and `residual` out, got {own}."
            )

    def start(self, matrix: Matrix) -> Any:
        """Returns the norm of the last Lambda, 0 for none."""
        if matrix.side == "both" and self.granularity == "column":
            raise ValueError(
                f'recover_scale(granularity="column") cannot serve leaf '
                f'{matrix.path!r} with side="both": its projection is r x r and has '
                'no column for each column of the gradient. Use granularity="tensor".'
            )
        norm = () if self.growth_limit is None else jnp.zeros([], jnp.float32)
        if self.energy_decay is None:
            return norm
        return Energies(jnp.zeros((1, matrix.n), jnp.float32), norm)

    def axes(self, matrix: Matrix) -> Any:
        """Says that there is an energy for every column of the projection."""
        none = super().axes(matrix)
        if self.energy_decay is None:
            return none
        return none._replace(energy=Axes(((), matrix.low_axes[1])))

    def update(
        self, matrix: Matrix, state: Any, view: LeafView, scale: Any
    ) -> tuple[Recovered, Any]:
        """Returns ``low``, ``phi`` and ``bound`` of ``P low + G phi``."""
        direction, projected = wide(view.direction), wide(view.projected)
        taken = scale if self.residual == "authors" else 1.0
        norm, energy, squares = state, None, jnp.zeros((1, 1))
        if self.growth_limit is not None or self.energy_decay is not None:
            squares = view.gradient.map(lambda g: jnp.square(wide(g))).column_sums()
            # Numbers without a square take no step, so that they count for nothing.
            squares = kept_if(has_square(jnp.sqrt(squares)), squares)
        own = self._norm(direction)
        if self.energy_decay is None:
            size = self._norm(projected)
            phi = jnp.where(size > 0.0, own / (size + 1e-8), 0.0)
        else:
            norm = state.norm
            residual = self._columns(view, squares, projected, jnp.ones_like(own), 1.0)
            phi, energy = self._by_energy(matrix, state.energy, residual, view.count)
            # In the middle of an accumulation N is zero, and nothing moves.
            phi = jnp.where(jnp.any(direction != 0), phi, 0.0)
        bound = None
        if self.entry_limit is not None:
            # The root mean square of N_j has its r entries, or those of all N.
            whole = self.granularity == "tensor"
            entries = direction.size if whole else direction.shape[-2]
            bound = self.entry_limit * own / entries**0.5
        phi = self.factor * phi
        if self.growth_limit is not None:
            if bound is not None and energy is None:
                phi = jnp.minimum(phi, self._most(matrix, bound, squares))
            size, least = self._size(view, squares, projected, direction, phi, taken)
            factor, norm = limit_growth(size, least, norm, self.growth_limit)
            phi = phi * factor
        state = norm if energy is None else Energies(energy, norm)
        if self.of == "gradient":
            if bound is not None:
                bound = scale * bound
            return Recovered(None, scale * phi, bound=bound), state
        low = scale * direction - taken * phi * projected
        return Recovered(low, phi, bound=bound), state

    def _by_energy(
        self, matrix: Matrix, before: Array, residual: Array, count: Array
    ) -> tuple[Array, Array]:
        """Returns what brings columns to entries near 1, and their energies so far."""
        decay: Any = self.energy_decay
        # A difference of almost equal sums may come out negative.
        residual = jnp.maximum(residual, 0.0)
        energy = decay * before + (1 - decay) * residual
        mean = energy
        if self.debias:
            mean = energy / weight_seen(decay, count.astype(energy.dtype) + 1.0)
        entries = float(matrix.m - matrix.rank) ** 0.5
        known = mean > 0.0
        root = jnp.sqrt(jnp.where(known, mean, 1.0))
        return jnp.where(known, entries / root, 0.0), energy.astype(before.dtype)

    def _most(self, matrix: Matrix, bound: Array, squares: Array) -> Array:
        """Returns the largest phi for columns of such squares."""
        mean = squares / matrix.m
        if self.granularity == "tensor":
            mean = jnp.max(mean, -1, keepdims=True)
        # A column without gradient has nothing to limit.
        rms = jnp.sqrt(jnp.where(mean > 0.0, mean, 1.0))
        return jnp.where(mean > 0.0, _SHARE * bound / rms, jnp.inf)

    def _norm(self, x: Array) -> Array:
        """Returns the norms of columns ``[1, n]``, or that of the matrix ``[1, 1]``."""
        axes = -2 if self.granularity == "column" else (-2, -1)
        return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))

    def _size(
        self,
        view: LeafView,
        squares: Array,
        projected: Array,
        direction: Array,
        phi: Array,
        taken: Any,
    ) -> tuple[Array, Array]:
        """Returns ``|Lambda|``, and the least that counts.

        Differences are taken column by column: sums over all columns have lost the
        digits that a small one needs.
        """
        whole = jnp.sum(jnp.square(phi) * squares, (-2, -1))
        floor = jnp.maximum(whole, jnp.sum(jnp.square(direction), (-2, -1)))
        least = _ZERO * jnp.sqrt(floor)
        if self.of == "gradient":
            return jnp.sqrt(whole), least
        squared = jnp.sum(self._columns(view, squares, projected, phi, taken), (-2, -1))
        # A difference of almost equal sums may come out negative.
        return jnp.sqrt(jnp.maximum(squared, 0.0)), least

    def _columns(
        self, view: LeafView, squares: Array, projected: Array, phi: Array, taken: Any
    ) -> Array:
        """Returns ``phi_j^2 |(G - taken P R)_j|^2``, ``[1, n]`` or ``[1, 1]``."""
        if squares.shape[-1] != projected.shape[-1]:  # side="both" has no such columns
            squares = jnp.sum(squares, -1, keepdims=True)
            projected = projected.reshape(*projected.shape[:-2], -1, 1)

        # phi^2 (|G|^2 - 2 t |R|^2 + t^2 |P R|^2), t = `taken`
        def residual(inside: Array) -> Array:
            along = jnp.sum(jnp.square(projected), -2, keepdims=True)
            rest = squares - 2.0 * taken * along + jnp.square(taken) * inside
            return jnp.square(phi) * rest

        def exact() -> Array:
            low = regram(view.basis, wide(view.projected)).reshape(projected.shape)
            return residual(jnp.sum(projected * low, -2, keepdims=True))

        found = residual(jnp.sum(jnp.square(projected), -2, keepdims=True))
        # Static: other bases have the exact form alone in their program. The condition
        # is one for all matrices, since `vmap` of several would run both forms.
        if view.orthonormal:
            whole = jnp.sum(jnp.square(phi) * squares)
            small = view.anywhere(jnp.sum(found) < _SMALL * whole)
            found = jax.lax.cond(small, exact, lambda: found)
        else:
            found = exact()
        return found
