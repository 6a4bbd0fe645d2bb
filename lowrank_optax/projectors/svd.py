"""The exact leading singular vectors of the gradient."""

import dataclasses

from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.bases import leading_singular_vectors
from lowrank_optax.projectors._protocol import At, OrthonormalProjector


@dataclasses.dataclass(frozen=True, eq=False)
class svd(OrthonormalProjector):
    """Projects on the ``r`` leading singular vectors of the gradient.

    ``P = U[:, :r]`` of ``G = U S V^T``, in float32, on the left of the matrix view.
    No rank-r subspace captures more of the gradient's energy. The cost is a full
    SVD: ``benchmarks.optimizer_step`` times both refreshes. XLA's SVD also makes large
    programs on a TPU; prefer ``lro.power`` there.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one refresh to the next, the first at step 0
        (200 in the GaLore paper).
      basis_dtype: storage dtype of the basis.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if either is out of range.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.svd(rank=8, update_proj_gap=100).update_proj_gap
      100

    References:
      Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection (2024), https://arxiv.org/abs/2403.03507
    """

    def compute(self, matrix: Matrix, gradient: Array, old: Array, at: At) -> Array:
        """Returns ``U[:, :r]``."""
        del old, at
        return leading_singular_vectors(gradient, matrix.rank)
