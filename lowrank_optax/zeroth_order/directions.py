"""``Directions``: how a method draws the direction Z that a loss is tried along.

Every Z has mean zero and ``E[vec Z vec Z^T] = I``, so that ``<G, Z> Z`` is an unbiased
estimate of a gradient G, and step lengths and learning rates mean the same in all.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lowrank_optax import _checks
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.linalg.products import HIGHEST
from lowrank_optax.zeroth_order.noise import normal

Seed = UInt32[Array, "2"]


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """How the direction of one matrix is drawn; the base of all methods.

    A method of your own is a frozen dataclass (with ``eq=False``) that has what is
    here. ``keep`` and ``draw`` are written for one matrix ``[m, n]``; stacks of them
    are lifted. Leaves that ``selection`` does not choose get independent normal
    numbers.

    Attributes:
      selection: which leaves are matrices to draw for, None for no leaf.
      gap: for how many steps ``keep`` and ``epoch`` stay; None for the run.
    """

    @property
    def selection(self) -> Selection | None:
        """Chooses the leaves."""
        return None

    @property
    def gap(self) -> int | None:
        """Steps after which ``epoch`` changes and ``keep`` is called again."""
        return None

    def rank_of(self, path: str, m: int, n: int) -> int:
        """Returns the rank of a leaf's matrices."""
        raise NotImplementedError

    def keep(self, epoch: Seed, m: int, n: int, rank: int) -> tuple[Array, ...]:
        """Returns what is kept of a matrix from step to step, nothing by default."""
        del epoch, m, n, rank
        return ()

    def axes(self, matrix: Matrix) -> tuple[Axes, ...]:
        """Returns, for every array of ``keep``, the leaf's axes behind its axes."""
        del matrix
        return ()

    def draw(
        self,
        seed: Seed,
        epoch: Seed,
        kept: tuple[Array, ...],
        m: int,
        n: int,
        rank: int,
    ) -> Float[Array, "m n"]:
        """Draws Z in float32.

        Args:
          seed: of the matrix and the step.
          epoch: of the matrix and the ``gap`` steps that this one is among.
          kept: what ``keep`` has returned.
          m: rows.
          n: columns.
          rank: of Z.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class mezo(Directions):
    """Independent standard normal numbers for every entry: ``Z ~ N(0, 1)``.

    For a gradient of norm 1 and N numbers the estimate has ``E|g|^2 - 1 = N + 1``.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.zeroth_order(lambda params: params["w"].sum(), lro.mezo()).eps
      0.001

    References:
      Malladi et al., Fine-Tuning Language Models with Just Forward Passes (2023),
      https://arxiv.org/abs/2305.17333

    Differences from the authors' code:
      * Both points are computed from parameters that do not change. In place, by ``+ e
        Z, - 2 e Z, + e Z``, 16-bit parameters walk away by rounding alone.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class _LowRank(Directions):
    """What directions of low rank have in common."""

    rank: Any = 8
    select: Any = dataclasses.field(default=None, kw_only=True)
    weight_dimension_numbers: Any = dataclasses.field(default=None, kw_only=True)
    layer_axis: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        _checks.rank(self.rank)
        _ = self.selection  # checked when the method is made
        if self.gap is not None:
            _checks.positive_int("update_proj_gap", self.gap)

    @property
    def selection(self) -> Selection:
        return Selection(
            select=self.select,
            weight_dimension_numbers=self.weight_dimension_numbers,
            layer_axis=self.layer_axis,
            clip_rank=True,
        )

    def rank_of(self, path: str, m: int, n: int) -> int:
        rank = self.rank(path) if callable(self.rank) else self.rank
        rank = _checks.rank(rank)
        if isinstance(rank, float):
            rank = max(1, round(rank * min(m, n)))
        return min(rank, m, n)


@dataclasses.dataclass(frozen=True, eq=False)
class subzero(_LowRank):
    """Directions in a random subspace of each matrix that stays for many steps.

    ``Z = sqrt(m n) / r * U z V^T`` with orthonormal ``U [m, r]`` and ``V [n, r]``,
    drawn anew every ``update_proj_gap`` steps, and a standard normal ``z [r, r]`` at
    every step. U and V are kept: ``r (m + n)`` numbers for every matrix.

    Low rank does not make the estimate of one matrix less noisy; it takes r^2 random
    numbers in place of m n, and moves the parameters in a small subspace for a while.

    Args:
      rank: r, an int, a fraction of min(m, n), or a callable of the leaf's path; at
        most min(m, n). 8, as in the authors' code.
      update_proj_gap: steps from one subspace to the next. 2000, as there.
      select: which leaves, as in ``lro.project``; all others, embeddings, heads and
        vectors by default, get independent numbers.
      weight_dimension_numbers: which of their axes form the matrices, likewise.
      layer_axis: an axis of leaves with three axes or more that counts layers.

    Raises:
      TypeError: if rank or gap is no Python number.
      ValueError: if either is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((12, 8)), "bias": jnp.zeros(8)}
      >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> zo = lro.zeroth_order(loss, lro.subzero(rank=2))
      >>> state = zo.init(params, jax.random.key(0))
      >>> [x.shape for x in state.kept["kernel"]]
      [(12, 2), (8, 2)]
      >>> (value, grads), state = zo.value_and_grad(params, state)
      >>> int(jnp.linalg.matrix_rank(grads["kernel"]))
      2

    References:
      Yu et al., SubZero: Zeroth-Order Fine-Tuning of LLMs in Random Subspaces (2024),
      https://arxiv.org/abs/2410.08989

    Differences from the authors' code:
      * The factor sqrt(m n) / r is the code's. The paper has none, and so another
        meaning of ``eps`` and learning rate: its estimate is ``r^2 / (m n)`` of the
        gradient on average.
      * Embeddings and output heads are not matrices to the default selection, as they
        are there.
      * Small matrices, as those of adapters, are not brought into another shape.
      * A resumed run has its subspaces, and several samples may be averaged.
    """

    update_proj_gap: int = 2000

    @property
    def gap(self) -> int:
        return self.update_proj_gap

    def keep(self, epoch: Seed, m: int, n: int, rank: int) -> tuple[Array, Array]:
        left, right = _pair(epoch, m, n, rank)
        with jax.default_matmul_precision("highest"):
            return jnp.linalg.qr(left)[0], jnp.linalg.qr(right)[0]

    def axes(self, matrix: Matrix) -> tuple[Axes, Axes]:
        return matrix.basis_axes, Axes((matrix.low_axes[1], ()))

    def draw(self, seed, epoch, kept, m, n, rank) -> Array:
        del epoch
        left, right = kept
        z = normal(seed, (rank, rank)) * jnp.float32((m * n) ** 0.5 / rank)
        return _product(_product(left, z), right.T)


@dataclasses.dataclass(frozen=True, eq=False)
class tezo(_LowRank):
    """Directions on r rank-one matrices that are the same for the whole run.

    ``Z = U diag(t) V^T / sqrt(r)`` with normal ``U [m, r]`` and ``V [n, r]``, drawn
    from the run's seed alone, and r normal numbers t at every step. Nothing is kept: U
    and V are drawn again where they are needed.

    Plain steps move a matrix only along r given directions, so that a run's result is r
    numbers for every matrix. The estimate is unbiased on average over U and V. For a
    gradient of norm 1, ``E|g|^2 - 1 = m n + 1 + (2 m n + 6 (m + n) + 10) / r``, which
    is about 1 + 2 / r times that of ``mezo``.

    Args:
      rank: r, as in ``subzero``. 32, about the mean of the paper's ranks, which it
        takes from the singular values of the weights; a callable may do so.
      select: as in ``subzero``.
      weight_dimension_numbers: as in ``subzero``.
      layer_axis: as in ``subzero``.

    Raises:
      TypeError: if the rank is no Python number.
      ValueError: if it is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((12, 8))}
      >>> zo = lro.zeroth_order(lambda p: jnp.sum(p["kernel"] ** 2), lro.tezo(rank=3))
      >>> state = zo.init(params, jax.random.key(0))
      >>> (value, grads), state = zo.value_and_grad(params, state)
      >>> int(jnp.linalg.matrix_rank(grads["kernel"]))
      3

    References:
      Sun et al., TeZO: Empowering the Low-Rankness on the Temporal Dimension in the
      Zeroth-Order Optimization for Fine-tuning LLMs (2025),
      https://arxiv.org/abs/2501.19057

    Differences from the paper:
      * Z is divided by sqrt(r), so that ``eps`` and the learning rate mean what they do
        in ``mezo``: the paper's ``rho`` is ``eps / sqrt(r)`` and its learning rate that
        of here divided by r.
      * Its momentum and Adam, kept as r numbers for every matrix, are not built. What
        ``optax.trace`` makes of the estimate is the same momentum, kept at full size.
    """

    rank: Any = 32

    def draw(self, seed, epoch, kept, m, n, rank) -> Array:
        del kept
        left, right = _pair(epoch, m, n, rank)
        times = normal(seed, (1, rank)) * jnp.float32(rank**-0.5)
        return _product(left * times, right.T)


@dataclasses.dataclass(frozen=True, eq=False)
class lozo(_LowRank):
    """Directions of low rank with one side new at every step.

    ``Z = U V^T / sqrt(r)`` with a normal ``U [m, r]`` at every step and a normal
    ``V [n, r]`` that stays for ``update_proj_gap`` steps. Nothing is kept. For a
    gradient of norm 1, ``E|g|^2 - 1 = m n + 1 + (2 (m + n) + 2) / r``.

    Args:
      rank: r, as in ``subzero``. 4; the paper has 2 to 8.
      update_proj_gap: steps for which V stays. 50; the paper has 50 to 100.
      select: as in ``subzero``.
      weight_dimension_numbers: as in ``subzero``.
      layer_axis: as in ``subzero``.

    Raises:
      TypeError: if rank or gap is no Python number.
      ValueError: if either is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((12, 8))}
      >>> zo = lro.zeroth_order(lambda p: jnp.sum(p["kernel"] ** 2), lro.lozo(rank=2))
      >>> state = zo.init(params, jax.random.key(0))
      >>> (value, grads), state = zo.value_and_grad(params, state)
      >>> int(jnp.linalg.matrix_rank(grads["kernel"]))
      2

    References:
      Chen et al., Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
      Structures (2024), https://arxiv.org/abs/2410.07698

    Differences from the paper:
      * Z is divided by sqrt(r), as in ``tezo``.
      * Its momentum, kept as m x r, is not built.
    """

    rank: Any = 4
    update_proj_gap: int = 50

    @property
    def gap(self) -> int:
        return self.update_proj_gap

    def draw(self, seed, epoch, kept, m, n, rank) -> Array:
        del kept
        left = normal(seed, (m, rank)) * jnp.float32(rank**-0.5)
        return _product(left, normal(epoch, (n, rank)).T)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _pair(seed: Seed, m: int, n: int, rank: int) -> tuple[Array, Array]:
    """Returns normal numbers ``[m, r]`` and ``[n, r]``."""
    both = normal(seed, (m + n, rank))
    return both[:m], both[m:]
