"""A basis that descends an online PCA loss by an optimizer of its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.layout import axes_of_state
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.leaves.moments import find
from lowrank_optax.linalg.bases import cholesky_qr, random_start
from lowrank_optax.linalg.pca import Size, frobenius, pca_gradient, penalty_gradient
from lowrank_optax.linalg.products import Operand, wide
from lowrank_optax.projectors._protocol import At, Projector, TrackingProjector
from lowrank_optax.quantization import is_quantized
from lowrank_optax.quantization.rounding import dither, round_to_bfloat16

# The largest number of an int32, the dtype of the count of steps.
NEVER = 2**31 - 1
LEARNING_RATE = 0.005


class OnlineBasis(NamedTuple):
    """A basis ``[m, r]`` and the state of the optimizer that moves it."""

    vectors: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True, eq=False)
class online_pca(TrackingProjector):
    r"""Moves the basis after every step, down the loss of principal components.

    With ``Gh = G / |G|`` (G itself without ``normalize``), after the gradient was
    projected on P and the direction lifted by it::

        L(P) = |P P^T Gh - Gh|^2 + ortho_penalty |P^T P - I|^2
        P <- P + basis_learning_rate * basis_optimizer(dL/dP)

    The derivative costs one product with G, ``2 m n r`` operations, and nothing of
    size m x n: ``P^T G`` is the projection that was used anyway. No factorization
    after the first basis. P is not kept orthonormal; at a small rate it is held near by
    the loss, whose minimum is any orthonormal basis of the leading subspace.

    Every matrix has a state of the basis optimizer to itself, and one that needs
    parameters gets P. A basis that would not be finite stays as it was. With an
    accumulation inside the bracket the basis moves at its end, by the last micro-batch.
    The matrices of a stack move one by one: a stack sharded over its layers is gathered
    for that, so shard another axis.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one re-orthonormalization to the next; by default it
        never comes. P then becomes its own orthonormal factor; one without full rank
        is found anew, like the first.
      basis_dtype: storage dtype of the basis and of its optimizer's moments; what is
        kept in bfloat16 is rounded at random.
      basis_optimizer: any Optax optimizer; None is ``optax.adamw(1.0)`` with
        ``weight_decay=0.01``, as released.
      basis_learning_rate: a number or a schedule of the bracket's steps, by which what
        ``basis_optimizer`` returns is multiplied; None is 0.005 (the released 1/200)
        for the default optimizer, and 1 for one given, which brings its own.
      ortho_penalty: weight of ``|P^T P - I|^2`` (0 as released).
      normalize: divide the gradient by its norm, so that its scale does not matter.
      cold_start: how the first basis is found: "power", "svd" (released), or "random",
        an orthonormal basis that has seen no gradient.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number, or
        ``basis_optimizer`` no transformation.
      ValueError: if one is out of range, or at init with ``side="both"``.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> projector = lro.online_pca(rank=16, basis_optimizer=optax.sgd(0.1))
      >>> projector.advances
      True

    References:
      Liang et al., Memory-Efficient LLM Training with Online Subspace Descent (2024),
      https://arxiv.org/abs/2408.12857
    """

    update_proj_gap: Any = NEVER
    _: dataclasses.KW_ONLY
    basis_optimizer: Any = None
    basis_learning_rate: optax.ScalarOrSchedule | None = None
    ortho_penalty: float | Array = 0.0
    normalize: bool = True

    advances = True
    starts = ("power", "svd", "random")

    def __post_init__(self):
        """Checks the choices."""
        super().__post_init__()
        if self.basis_optimizer is not None:
            _checks.transformation("basis_optimizer", self.basis_optimizer, "sgd(0.1)")

    def start(self, matrix: Matrix) -> OnlineBasis:
        """Starts the basis, and the optimizer on it."""
        return self._started(super().start(matrix))

    def _started(self, basis: Array) -> OnlineBasis:
        # The optimizer sees float32 at every step, also of a basis in bfloat16.
        state = self._optimizer().init(wide(basis))
        return OnlineBasis(basis, _narrowed(state, basis.dtype))

    def adopt(self, matrix: Matrix, basis: Array, at: At, of: Projector) -> OnlineBasis:
        """Takes a basis over; the optimizer on it starts anew."""
        return self._started(super().adopt(matrix, basis, at, of))

    def axes(self, matrix: Matrix) -> OnlineBasis:
        """Says that of the basis, and of what its optimizer keeps beside it."""
        vectors = super().axes(matrix)

        def init(vectors: Any) -> Any:
            return self._optimizer().init(vectors)

        # Any optimizer may stand here, so its own init is asked which axes it keeps.
        like = jax.ShapeDtypeStruct((matrix.m, matrix.rank), jnp.float32)
        own = functools.partial(Axes.of_a, "basis")
        return OnlineBasis(vectors, jax.tree.map(own, axes_of_state(init, like)))

    def refresh(self, matrix: Matrix, gradient: Any, stored: OnlineBasis, at: At):
        """Finds the first basis, or makes the basis orthonormal again."""
        basis = super().refresh(matrix, gradient, stored.vectors, at)
        return stored._replace(vectors=basis)

    def find(self, matrix: Matrix, gradient: Operand, at: At) -> Array:
        """Returns the first basis."""
        if self.cold_start == "random":
            start = random_start(at.key, matrix.m, matrix.rank, gradient.dtype)
            return cholesky_qr(start)
        return super().find(matrix, gradient, at)

    def follow(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Returns the orthonormal factor of the basis."""
        del matrix, gradient, at
        return cholesky_qr(old)

    def advance(
        self,
        matrix: Matrix,
        stored: OnlineBasis,
        gradient: Any,
        projected: Array,
        at: At,
    ) -> OnlineBasis:
        """Takes one step of the basis optimizer."""
        basis = wide(stored.vectors)
        gradient = Operand.of(gradient, matrix.transposed).astype(basis.dtype)
        size = frobenius(gradient) if self.normalize else Size()
        low = projected.astype(basis.dtype)
        slope = pca_gradient(gradient, basis, low, size)
        # No branch on a penalty of 0: `optax.inject_hyperparams` may trace it.
        slope = slope + self.ortho_penalty * penalty_gradient(basis)
        before = _moments(lambda _, x: wide(x), stored.optimizer)
        step, state = self._optimizer().update(slope, before, basis)
        basis = basis + self._rate(at.count) * jnp.asarray(step)
        moved = OnlineBasis(basis, state)
        return _rounded(moved, stored, at)

    def basis(self, matrix: Matrix, stored: OnlineBasis, at: At) -> Array:
        """Returns the basis of this step."""
        del matrix, at
        return stored.vectors

    def align(self, old: OnlineBasis, new: OnlineBasis) -> OnlineBasis:
        """Flips new basis vectors that point against the old ones."""
        return new._replace(vectors=super().align(old.vectors, new.vectors))

    def rotation(self, old: OnlineBasis, new: OnlineBasis):
        """Returns ``C = P_new^T P_old``."""
        return super().rotation(old.vectors, new.vectors)

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        if self.basis_optimizer is None:
            # A rate of 1 brings the minus sign; `_rate` is multiplied in later.
            return optax.with_extra_args_support(optax.adamw(1.0, weight_decay=0.01))
        return optax.with_extra_args_support(self.basis_optimizer)

    def _rate(self, count: Array) -> Any:
        rate = self.basis_learning_rate
        if rate is None:
            return LEARNING_RATE if self.basis_optimizer is None else 1.0
        return rate(count) if callable(rate) else rate


def _narrowed(state: Any, dtype: Any) -> Any:
    """Returns a basis optimizer's fresh state, its moments in the basis' dtype."""
    narrower = jnp.dtype(dtype).itemsize < 4
    return _moments(lambda _, x: x.astype(dtype), state) if narrower else state


def _rounded(moved: OnlineBasis, stored: OnlineBasis, at: At) -> OnlineBasis:
    """Casts a basis and its moments to the dtypes in which they are stored.

    To bfloat16 at random: a step of the basis is less than a unit there, and so is a
    step's decay of a second moment.
    """
    dtype = stored.vectors.dtype
    if dtype != jnp.bfloat16:
        return moved._replace(vectors=moved.vectors.astype(dtype))
    seeds = (*jax.random.key_data(at.key), at.count)

    def rounded(place: int, x: Array) -> Array:
        return round_to_bfloat16(x, dither((*seeds, place), x.shape))

    return OnlineBasis(rounded(0, moved.vectors), _moments(rounded, moved.optimizer))


def _moments(change: Callable[[int, Array], Array], state: Any) -> Any:
    """Changes the moments of a state, which are numbered from 1 on.

    Not those that are encoded, and no other array, such as a learning rate.
    """
    moments = find(state)
    leaves, treedef = jax.tree.flatten(moments.groups, is_leaf=is_quantized)
    changed = [
        x if is_quantized(x) else change(i, x) for i, x in enumerate(leaves, start=1)
    ]
    return moments.rebuild(treedef.unflatten(changed))
