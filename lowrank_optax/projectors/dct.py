"""Columns of a fixed cosine basis, chosen by how much of the gradient they see."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.linalg.dct import KINDS, dct_columns, dct_matrix
from lowrank_optax.linalg.products import Operand, unit_peak, wide
from lowrank_optax.projectors._protocol import At, Projector


@dataclasses.dataclass(frozen=True, eq=False)
class dct(Projector):
    r"""Projects on ``r`` columns of the orthogonal cosine matrix.

    With ``Q[i, j] = sqrt(2 / m) c_i cos(pi i (2 j + 1) / (2 m))``, ``c_0 = sqrt(1/2)``,
    and D one of two bases made of it::

        D = Q    kind="dct3": column j holds sample j of every cosine
        D = Q^T  kind="dct2": column j is the cosine of frequency j
        S = D^T G,   score_j = sum_k |S_jk|  (norm=1)   or   sum_k S_jk^2  (norm=2)
        P = the r columns of D with the largest scores, in ascending order of j

    With ``norm=2`` no other r columns of D capture more of the gradient's energy. What
    is stored are r indices: the columns ``[m, r]`` are computed from them at each step,
    D itself ``[m, m]`` only while a refresh runs. Choosing costs one product of
    ``m x m`` with ``m x n`` at the highest precision and as much transient memory as
    the gradient, whatever the rank is: dear for a long side.

    Two bases share whole columns or nothing, so moments can follow exactly
    (``lro.gather_moments``).

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one choice to the next, the first at step 0 (paper:
        1).
      kind: "dct3" (the released code's product with Q) or "dct2" (its fast transform).
      norm: 1 (paper), or 2 for the columns of largest energy.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if either is out of range, ``kind`` or ``norm`` is unknown, or (at
        init) the projected side is longer than 2^20.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> bracket = lro.project(lro.dct(rank=2), select="w")
      >>> tx = lro.chain(bracket, optax.scale_by_adam(), lro.backproject())
      >>> params = {"w": jnp.ones((8, 6))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> state.basis["w"]
      Array([0, 1], dtype=int32)

    References:
      Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
      Optimization of Large Language Models (2025), https://arxiv.org/abs/2505.17967

    Differences from the authors' code:
      * Columns are ordered by index, theirs as the top-k comes out: without transport,
        moments there change place even when the columns stay.
      * The first choice is made at step 0 and then every ``update_proj_gap`` steps;
        there at steps 0, gap - 1, 2 gap - 1, ...
      * Every matrix has a cosine basis of its own size; there all share one.
      * ``norm`` can be chosen for both kinds.
    """

    update_proj_gap: int = 1
    kind: str = "dct3"
    norm: int = 1

    orthonormal = True
    selects = True

    def __post_init__(self):
        """Checks the numbers and the choices."""
        super().__post_init__()
        _checks.choice("kind", self.kind, KINDS)
        _checks.choice("norm", self.norm, (1, 2))

    def start(self, matrix: Matrix) -> Array:
        """Starts from the first r columns: valid, and never used for long."""
        return jnp.arange(matrix.rank, dtype=jnp.int32)

    def axes(self, matrix: Matrix) -> Axes:
        """Says that there is a number for every row of the projection."""
        del matrix
        return Axes.of_a("projection", [(0,)])

    def adopt(self, matrix: Matrix, basis: Array, at: At, of: Projector) -> Array:
        """Finds the basis' columns among D's; the others are the first ones left."""
        del at
        if not isinstance(of, dct) or of.kind != self.kind:
            raise ValueError(
                f"lro.dct(kind={self.kind!r}) chooses among fixed vectors, and those "
                f"of leaf {matrix.path!r}, of lro.{type(of).__name__}, are others."
            )
        seen = jnp.abs(wide(basis).T @ dct_matrix(matrix.m, self.kind, jnp.float32))
        chosen = jnp.argmax(seen, axis=1).astype(jnp.int32)
        taken = jnp.zeros(matrix.m, jnp.bool_).at[chosen].set(True)
        free = jnp.argsort(taken, stable=True)[: matrix.rank - len(chosen)]
        return jnp.concatenate([chosen, free.astype(jnp.int32)])

    def refresh(self, matrix: Matrix, gradient: Any, stored: Array, at: At) -> Array:
        """Chooses the r columns that see most of the gradient."""
        del stored, at
        best = jax.lax.top_k(self.scores(matrix, gradient), matrix.rank)[1]
        # By index, so that a choice that stays leaves every vector in its place.
        return jnp.sort(best).astype(jnp.int32)

    def scores(self, matrix: Matrix, gradient: Any) -> Array:
        """Returns how much each of the m columns sees, up to a common factor."""
        gradient = Operand.of(gradient, matrix.transposed)
        # A power of two keeps squares in range, and the order of the scores.
        gradient = gradient.map(lambda x: unit_peak(wide(x))[0])
        seen = gradient.down(dct_matrix(matrix.m, self.kind, gradient.dtype))
        return jnp.sum(jnp.abs(seen) if self.norm == 1 else jnp.square(seen), axis=1)

    def basis(self, matrix: Matrix, stored: Array, at: At) -> Array:
        """Computes the chosen columns ``[m, r]``."""
        del at
        return dct_columns(matrix.m, stored, self.kind)

    def rotation(self, old: Array, new: Array) -> Rotation:
        """Returns ``C = P_new^T P_old``: 1 where a column is the same one, else 0."""
        return Rotation((new[:, None] == old[None, :]).astype(jnp.float32))
