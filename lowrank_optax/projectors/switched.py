"""Leading directions of all gradients so far, and others drawn anew (Alice)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.linalg.bases import (
    block_power,
    cholesky_qr,
    outside,
    random_start,
)
from lowrank_optax.linalg.products import HIGHEST, Operand, outer, unit_peak, wide
from lowrank_optax.projectors._protocol import (
    COLD_SWEEPS,
    At,
    BasisProjector,
    Projector,
)

# How much of the old basis goes into the new one before it is orthonormalized: it gives
# directions where the gradients have fewer than r.
_MIX = 1e-3


class SwitchedBasis(NamedTuple):
    """A basis ``[m, r]``, and the mean of ``R R^T``, ``[r, r]``, or ``()``."""

    vectors: Any
    second: Any


@dataclasses.dataclass(frozen=True, eq=False)
class switched(BasisProjector):
    r"""Keeps the leading directions and draws the others from what is left.

    With ``tracking`` b, after every step ``Q <- b Q + (1 - b) R R^T`` in the basis U.
    At a refresh (b = 0 and no Q without tracking)::

        B = b U Q U^T + (1 - b) G G^T            never formed
        Y = orthonormal basis of B U             one step of subspace iteration
        Y E = Y times the eigenvectors of Y^T B Y, leading ones first
        U <- [first `leading` columns of Y E, random orthonormal ones outside of Y]

    so that in time every direction has its turn, while the strongest stay. Q turns into
    the new basis, ``C Q C^T`` with ``C = U_new^T U_old``. The first basis comes from
    power steps from a random start. The random columns are a function of the bracket's
    key, the leaf's path, the matrix and the epoch. Where less than ``r - leading``
    directions lie outside of Y, more of Y is kept.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one switch to the next, the first at step 0.
      basis_dtype: storage dtype of the basis.
      leading: how many columns are kept, an int, or a share of r (at least one).
      tracking: decay b of Q; None keeps no Q, and looks at the gradient of the refresh
        alone. May be traced.

    Raises:
      TypeError: if a count is not a Python number.
      ValueError: if a count is out of range.

    Examples:
      >>> import lowrank_optax as lro
      >>> tx = lro.galore(1e-2, projector=lro.switched(8, leading=3))

    References:
      Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher
      Approximation with a Low-Rank Extension (2025), https://arxiv.org/abs/2502.07752
    """

    _: dataclasses.KW_ONLY
    leading: int | float = 0.3125
    tracking: float | Array | None = 0.999

    def __post_init__(self):
        """Checks the counts."""
        super().__post_init__()
        _checks.rank(self.leading)

    @property
    def orthonormal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the storage dtype keeps it so; beside the basis stands Q."""
        dtype = self.basis_dtype or jnp.float32
        return bool(jnp.finfo(dtype).eps <= jnp.finfo(jnp.float32).eps)

    @property
    def advances(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether Q follows the gradients."""
        return self.tracking is not None

    def start(self, matrix: Matrix) -> SwitchedBasis:
        """Starts with the first unit vectors, and nothing in Q."""
        second = ()
        if self.tracking is not None:
            second = jnp.zeros((matrix.rank, matrix.rank), jnp.float32)
        return SwitchedBasis(super().start(matrix), second)

    def axes(self, matrix: Matrix) -> SwitchedBasis:
        """Says that Q has the basis' own vectors alone."""
        second = () if self.tracking is None else Axes(((), ()))
        return SwitchedBasis(super().axes(matrix), second)

    def refresh(
        self, matrix: Matrix, gradient: Any, stored: SwitchedBasis, at: At
    ) -> SwitchedBasis:
        """Switches the basis and turns Q."""
        old = wide(stored.vectors)
        gradient = Operand.of(gradient, matrix.transposed).astype(old.dtype)
        new = self._switched(matrix, gradient, old, stored.second, at)
        second = stored.second
        if self.tracking is not None:
            turn = jnp.matmul(new.T, old, precision=HIGHEST)
            second = _symmetric(_framed(turn, second))
        return SwitchedBasis(new.astype(stored.vectors.dtype), second)

    def _switched(
        self, matrix: Matrix, gradient: Operand, old: Array, second: Any, at: At
    ) -> Array:
        first, others = jax.random.split(at.key)
        # One scale for G and Q, in which squares of squares are in range.
        scaled, size = unit_peak(gradient.stored)
        gradient = dataclasses.replace(gradient, stored=scaled)
        past, share = jnp.zeros((matrix.rank, matrix.rank), old.dtype), 1.0
        if self.tracking is not None:
            past = self.tracking * (second / jnp.square(size)).astype(old.dtype)
            share = 1.0 - self.tracking

        def cold() -> Array:
            start = random_start(first, matrix.m, matrix.rank, old.dtype)
            return block_power(gradient, start, COLD_SWEEPS)

        def warm() -> Array:
            seen = gradient.across(gradient.down(old))
            image = jnp.matmul(old, past, precision=HIGHEST) + share * seen
            # To columns of one length: weak directions are worth as much as strong.
            norms = jnp.linalg.norm(image, axis=0, keepdims=True)
            floor = 1e-4 * jnp.max(norms)
            return cholesky_qr(image / jnp.maximum(norms, floor) + _MIX * old)

        basis = jax.lax.cond(at.cold, cold, warm)
        low = gradient.down(basis)
        turn = jnp.matmul(basis.T, old, precision=HIGHEST)
        ritz = _framed(turn, past) + share * outer(low, low)
        vectors = jnp.linalg.eigh(_symmetric(ritz))[1][:, ::-1]
        kept = self._kept(matrix)
        leading = jnp.matmul(basis, vectors[:, :kept], precision=HIGHEST)
        if kept == matrix.rank:
            return leading
        drawn = outside(basis, matrix.rank - kept, others)
        return jnp.concatenate([leading, drawn], axis=1)

    def _kept(self, matrix: Matrix) -> int:
        """Returns how many columns are kept: more where there are too few others."""
        leading = self.leading
        if isinstance(leading, float):
            leading = max(1, round(leading * matrix.rank))
        return min(matrix.rank, max(leading, 2 * matrix.rank - matrix.m))

    def advance(
        self,
        matrix: Matrix,
        stored: SwitchedBasis,
        gradient: Any,
        projected: Array,
        at: At,
    ) -> SwitchedBasis:
        """Adds ``R R^T`` to its mean."""
        del matrix, gradient, at
        decay: Any = self.tracking
        low = wide(projected).astype(jnp.float32)
        second = decay * stored.second + (1 - decay) * outer(low, low)
        return stored._replace(second=second)

    def basis(self, matrix: Matrix, stored: SwitchedBasis, at: At) -> Array:
        """Returns the basis itself."""
        del matrix, at
        return stored.vectors

    def adopt(
        self, matrix: Matrix, basis: Array, at: At, of: Projector
    ) -> SwitchedBasis:
        """Takes a basis over; Q begins anew."""
        vectors = super().adopt(matrix, basis, at, of)
        return self.start(matrix)._replace(vectors=vectors)

    def align(self, old: SwitchedBasis, new: SwitchedBasis) -> SwitchedBasis:
        """Flips new vectors that point against the old ones, and Q with them."""
        vectors = super().align(old.vectors, new.vectors)
        if self.tracking is None:
            return new._replace(vectors=vectors)
        signs = jnp.sign(jnp.sum(wide(vectors) * wide(new.vectors), 0))
        return SwitchedBasis(vectors, new.second * signs[:, None] * signs[None, :])

    def rotation(self, old: SwitchedBasis, new: SwitchedBasis) -> Any:
        """Returns ``C = U_new^T U_old``."""
        return super().rotation(old.vectors, new.vectors)


def _framed(turn: Array, inside: Array) -> Array:
    """Returns ``C Q C^T``."""
    return jnp.matmul(
        jnp.matmul(turn, inside, precision=HIGHEST), turn.T, precision=HIGHEST
    )


def _symmetric(x: Array) -> Array:
    return (x + x.T) / 2
