"""``rank_by_energy``: a rank for every leaf, chosen from a few gradients."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.bracket.start import Described, described
from lowrank_optax.bracket.subspace import subspace
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.products import HIGHEST, unit_peak, wide
from lowrank_optax.projectors import power
from lowrank_optax.shapes.report import aligned

# Sums of float32 reach 1 up to their rounding.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class RankRow:
    """One leaf's rank.

    Attributes:
      path: the leaf's path.
      shape: its shape as stored.
      rank: the rank chosen.
      largest: min(m, n) of its matrices.
      kept: share of their energy at this rank.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    largest: int
    kept: float


@dataclasses.dataclass(frozen=True)
class EnergyRanks:
    """Ranks of leaves by their paths, printable; a method's ``rank``.

    Attributes:
      share: what was asked for.
      rows: one for every leaf that would be projected.
    """

    share: float
    rows: tuple[RankRow, ...]

    def __call__(self, path: str) -> int:
        """Returns the rank of the leaf at a path."""
        for row in self.rows:
            if row.path == path:
                return row.rank
        known = ", ".join(repr(row.path) for row in self.rows) or "none"
        raise ValueError(
            f"lro.rank_by_energy has chosen no rank for leaf {path!r}; it has for "
            f"{known}. Give it gradients of the same parameters, and as `selection` "
            "what the optimizer selects by."
        )

    def __str__(self) -> str:
        """Returns the table."""
        cells = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                f"{row.rank} of {row.largest}",
                f"{row.kept:.1%}",
            )
            for row in self.rows
        ]
        return "\n".join(aligned([("leaf", "shape", "rank", "energy"), *cells]))


def rank_by_energy(
    share: float,
    *gradients: Any,
    minimum: int = 1,
    maximum: int | None = None,
    multiple: int = 1,
    selection: Selection | None = None,
) -> EnergyRanks:
    r"""Chooses for every leaf the rank that holds a share of its gradients' energy.

    With the singular values ``s_1 >= s_2 >= ...`` of a gradient ``G [m, n]``::

        kept(r) = sum_{i<=r} s_i^2 / sum_i s_i^2        = |P P^T G|^2 / |G|^2
        rank    = the least r with mean kept(r) >= share

    The mean is over all gradients, and over all matrices of a stack, which have one
    rank, as an array has one shape; matrices without gradient do not count. P are the
    r leading singular vectors, and no other basis keeps more. Then the rank is rounded
    up to a multiple and put between the bounds, and at most min(m, n). It is static
    from there on: a plain function of the leaf's path.

    A gradient of one small batch is noisier, and so of higher rank, than the means that
    a run lives by. Take gradients of whole batches, and behind the first steps.

    Args:
      share: of the energy, in (0, 1].
      *gradients: trees like the parameters, each the gradient of another batch.
      minimum: the least rank.
      maximum: the largest, None for min(m, n).
      multiple: of which ranks are multiples, such as 8 for codes in blocks.
      selection: which leaves are projected, and how they are seen; None is the default
        rule. Give what the optimizer is given: ``lro.Selection(select=...,
        layer_axis=0)``.

    Returns:
      What a method takes as its ``rank``; print it for a table.

    Raises:
      TypeError: if a count is no Python int.
      ValueError: if a number is out of range, there is no gradient, two differ in their
        structure, or one is not finite. When it is called: for another leaf's path.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> u, v = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (32, 32)))
      >>> spectrum = jnp.where(jnp.arange(32) < 3, 2.0, 0.1)
      >>> gradient = {"kernel": u * spectrum @ u.T, "bias": jnp.ones(32)}
      >>> ranks = lro.rank_by_energy(0.9, gradient)
      >>> print(ranks)
      leaf    shape  rank     energy
      kernel  32x32  3 of 32  97.6%
      >>> tx = lro.galore(1e-2, rank=ranks)
      >>> tx.init(gradient).basis["kernel"].shape
      (32, 3)
    """
    if not isinstance(share, float | int) or not 0.0 < share <= 1.0:
        raise ValueError(
            f"`share` is a part of the gradients' energy, in (0, 1]; got {share!r}."
        )
    _checks.positive_int("minimum", minimum)
    _checks.positive_int("multiple", multiple)
    if maximum is not None:
        _checks.positive_int("maximum", maximum, least=minimum)
    if not gradients:
        raise ValueError(
            "lro.rank_by_energy needs gradients to choose by: "
            "rank_by_energy(0.9, jax.grad(loss)(params, batch), ...)."
        )
    structures = [jax.tree.structure(tree) for tree in gradients]
    if any(each != structures[0] for each in structures):
        raise ValueError(
            "The gradients given to lro.rank_by_energy must be trees of one structure; "
            f"got {structures}."
        )
    # What a bracket would project at the least rank: at a larger one, some leaves stay
    # full, and are not asked about.
    tx = subspace(power(1), optax.scale_by_adam(), selection=selection)
    bracket = described(tx, gradients[0])
    assert isinstance(bracket, Described)
    trees = [bracket.plan.arrays(tree) for tree in gradients]
    rows = []
    for i, matrix in bracket.plan.matrices():
        kept = _kept(matrix, [leaves[i] for leaves in trees])
        reached = np.flatnonzero(kept >= share - _ROUNDING)
        rank = int(reached[0]) + 1 if reached.size else len(kept)
        rank = max(minimum, math.ceil(rank / multiple) * multiple)
        rank = min(rank, maximum or rank, len(kept))
        row = RankRow(matrix.path, matrix.shape, rank, len(kept), float(kept[rank - 1]))
        rows.append(row)
    return EnergyRanks(float(share), tuple(rows))


def _kept(matrix: Matrix, gradients: list[Array]) -> np.ndarray:
    """Returns the mean share of the energy that every rank keeps."""
    energies = np.concatenate([np.asarray(_energies(matrix, g)) for g in gradients])
    if not np.isfinite(energies).all():
        raise ValueError(
            f"A gradient of leaf {matrix.path!r} given to lro.rank_by_energy is not "
            "finite. Leave it out."
        )
    energies = np.maximum(energies[:, ::-1].astype(np.float64), 0.0)
    energies = energies[energies.sum(1) > 0]
    if not len(energies):  # without any gradient the least rank will do
        return np.ones(min(matrix.m, matrix.n))
    return np.mean(np.cumsum(energies, 1) / energies.sum(1, keepdims=True), 0)


@jax.jit
def _energies(matrix: Matrix, gradient: Array) -> Array:
    """Returns the squared singular values of every matrix, in units of its largest."""
    view = wide(matrix.view(gradient)).reshape((-1, matrix.m, matrix.n))
    if matrix.m > matrix.n:
        view = jnp.swapaxes(view, -1, -2)

    def one(x: Array) -> Array:
        scaled, _ = unit_peak(x)
        return jnp.linalg.eigvalsh(jnp.matmul(scaled, scaled.T, precision=HIGHEST))

    return jax.lax.map(one, view)
