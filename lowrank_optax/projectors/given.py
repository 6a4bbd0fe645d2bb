"""Bases that come from outside: recorded runs, research, tests."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.projectors._protocol import At, BasisProjector

# The key of the bases of the one leaf that a projector belongs to.
_OWN = ""


@dataclasses.dataclass(frozen=True, eq=False)
class given(BasisProjector):
    """Uses bases that the caller supplies, one per refresh.

    At epoch k (step ``k * update_proj_gap``) a leaf takes ``bases[path][k]``, and
    keeps the last one when they run out. Signs are taken as they come: no alignment.

    Args:
      rank: the bases' number of columns.
      update_proj_gap: steps from one basis to the next.
      basis_dtype: storage dtype of the basis.
      bases: leaf path -> ``[k, m, r]``, or ``[k, layers, m, r]`` for a stack. With
        ``side="both"`` a pair (left bases, right bases).

    Raises:
      ValueError: at init, if a projected leaf has no bases or they have another
        shape than its matrix view.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> projector = lro.given(
      ...     rank=2, update_proj_gap=5, bases={"w": jnp.eye(4)[None, :, :2]}
      ... )
      >>> projector.bases["w"].shape
      (1, 4, 2)
    """

    bases: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sides(self) -> tuple["given", "given"]:
        """Splits pairs of bases into the two sides."""
        left = {path: pair[0] for path, pair in self.bases.items()}
        right = {path: pair[1] for path, pair in self.bases.items()}
        return (
            self.having(bases=left),
            self.having(bases=right),
        )

    def for_leaf(self, path: str) -> "given":
        """Returns a projector with the bases of this leaf alone."""
        if path not in self.bases:
            raise ValueError(
                f"lro.given has no bases for leaf {path!r}, only for "
                f"{sorted(self.bases)}. Add them, or do not select the leaf."
            )
        # A key of a mapping is part of a pytree's structure: under the leaf's own path,
        # no two leaves could share a trace.
        return self.having(bases={_OWN: self.bases[path]})

    def start(self, matrix: Matrix) -> Array:
        """Checks that this leaf's bases fit."""
        shape = jnp.shape(self.bases[_OWN])
        layers = (math.prod(matrix.batch_shape),) if matrix.batch else ()
        expected = (*layers, matrix.m, matrix.rank)
        if shape[1:] != expected or not shape:
            raise ValueError(
                f"The bases of leaf {matrix.path!r} must have shape [k, "
                f"{', '.join(map(str, expected))}] (basis on the {matrix.side} side), "
                f"got {shape}."
            )
        return super().start(matrix)

    def compute(self, matrix: Matrix, gradient: Array, old: Array, at: At) -> Array:
        """Looks the basis of this epoch up."""
        del gradient, old
        bases = jnp.asarray(self.bases[_OWN], jnp.float32)
        basis = bases[jnp.minimum(at.epoch, len(bases) - 1)]
        return basis[at.layer] if basis.ndim == 3 else basis

    def align(self, old: Array, new: Array) -> Array:
        """Leaves the signs as given."""
        del old
        return new
