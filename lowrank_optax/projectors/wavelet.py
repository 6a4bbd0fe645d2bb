"""The approximation band of a wavelet transform: nothing to find, nothing to store."""

import dataclasses
from typing import Any

from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix, Parts
from lowrank_optax.linalg.products import Operand, wide
from lowrank_optax.linalg.wavelet import WAVELETS, WaveletBasis, band_sizes, dwt, lift
from lowrank_optax.projectors._protocol import At, Projector

_SIDES = {0: "left", -2: "left", 1: "right", -1: "right", "auto": "auto"}


@dataclasses.dataclass(frozen=True, eq=False)
class wavelet(Projector):
    r"""Projects on the approximation band of a discrete wavelet transform.

    Along one axis of the matrix, m long, ``level`` times::

        a[k] = sum_j h[j] x[2 k + j - (L - 2)]          x is 0 outside

    for Haar ``a[k] = (x[2k] + x[2k + 1]) / sqrt(2)``: after l levels the sum of ``2^l``
    neighbours over ``2^(l/2)``. ``R`` has ``r = ceil(m / 2^l)`` rows with Haar and
    ``floor((m + L - 1) / 2)`` per level with a longer filter of L taps. The rows of the
    map are orthonormal, and ``up`` is its transpose. Nothing is stored, computed at a
    refresh or random; there is no refresh.

    The axis decides the side, so ``lro.project``'s ``side`` keeps its default.
    With Haar and level l, a shard of the axis whose size is divisible by ``2^l`` is
    transformed where it is, without communication.

    Args:
      level: number of levels l; each halves the moments (2 in the paper).
      wavelet: "haar" or Daubechies' "db2" to "db10" ("db1" is Haar).
      axis: -2 transforms along the rows of the stored matrix, the input axis of a Flax
        kernel ``(in, out)`` and so the axis of the paper; -1 along the columns (torch's
        ``(out, in)``); 0 and 1 mean the same two. "auto": the input axis, or the output
        axis if with that one alone no coefficient crosses from shard to shard, as far
        as ``param_shardings`` or arrays on an Explicit mesh tell.

    Raises:
      TypeError: if ``level`` is not an int.
      ValueError: if ``level`` is negative, or ``wavelet`` or ``axis`` is unknown; at
        init, if ``lro.project`` was given a ``side`` besides.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> bracket = lro.project(lro.wavelet(level=2))
      >>> tx = lro.chain(bracket, optax.scale_by_adam(), lro.backproject())
      >>> tx.init({"w": jnp.ones((64, 32))}).inner_state.mu["w"].shape
      (16, 32)

    References:
      GWT: Scalable Optimizer State Compression for Large Language Model Training
      (2025), https://arxiv.org/abs/2501.07237
      Daubechies, Orthonormal bases of compactly supported wavelets (1988).
    """

    # Every projector has these two fields, and here they say nothing: the level decides
    # the size, and there is no refresh. So nobody is asked for them.
    rank: Any = dataclasses.field(default=None, init=False, repr=False)
    update_proj_gap: int = dataclasses.field(default=1, init=False, repr=False)
    level: int = 2
    wavelet: str = "haar"
    axis: int | str = -2

    stores_basis = False
    orthonormal = True

    def __post_init__(self):
        """Checks the choices."""
        # The base class would check the rank, and there is none.
        _checks.positive_int("level", self.level, least=0)
        _checks.choice("wavelet", self.wavelet, WAVELETS)
        _checks.choice("axis", self.axis, tuple(_SIDES))

    def side_of(self, matrix: Matrix, parts: Parts | None) -> str:
        """Returns the side of the axis."""
        side = _SIDES[self.axis]
        if side != "auto":
            return side
        sides = ("left", "right") if matrix.reduction_is_rows else ("right", "left")
        if parts is None:
            return sides[0]
        pieces: dict[str, int] = {"left": parts[0], "right": parts[1]}

        def is_local(side: str) -> bool:
            size, into = matrix.seen_from(side).m, pieces[side]
            # In shards of whole blocks no coefficient of Haar's crosses a border.
            whole = into > 1 and size % (into * 2**self.level) == 0
            return into == 1 or (whole and self._is_haar)

        return next(filter(is_local, sides), sides[0])

    def rank_of(self, matrix: Matrix) -> int:
        """Returns the length of the approximation band."""
        return band_sizes(matrix.m, self.level, self.wavelet)[-1]

    def largest_rank(self, matrix: Matrix) -> int:
        """Returns the same: a band fits any matrix."""
        return self.rank_of(matrix)

    def at_rank(self, matrix: Matrix, rank: int) -> tuple[str, Projector] | None:
        """Returns the level whose band is so long, and the projector on it."""
        # Its own one first: the bands of several levels may be of one length.
        for level in (self.level, *range(matrix.m.bit_length() + 1)):
            if band_sizes(matrix.m, level, self.wavelet)[-1] == rank:
                return f"level={level}", dataclasses.replace(self, level=level)
        return None

    def block_of(self, matrix: Matrix) -> int:
        """Returns ``2^level`` where whole blocks cover the axis."""
        block = 2**self.level
        return block if self._is_haar and matrix.m % block == 0 else 0

    @property
    def _is_haar(self) -> bool:
        return WaveletBasis(self.level, self.wavelet).is_haar

    def both(self) -> Projector:
        """Refuses."""
        raise ValueError(
            'lro.wavelet transforms one axis, so there is no side="both"; say which '
            "with lro.wavelet(axis=-2) or axis=-1."
        )

    def start(self, matrix: Matrix) -> tuple[()]:
        """Stores nothing."""
        del matrix
        return ()

    def basis(self, matrix: Matrix, stored: tuple[()], at: At) -> WaveletBasis:
        """Says which transform it is."""
        del matrix, stored, at
        return WaveletBasis(self.level, self.wavelet)

    def down(self, matrix: Matrix, basis: WaveletBasis, x: Operand) -> Array:
        """Returns the approximation band, ``[r, n]``."""
        x = Operand.of(x, matrix.transposed)
        # Along the axis where it is stored, so no large matrix is transposed.
        bands = dwt(wide(x.stored), basis.level, basis.wavelet, x.axis)
        return x.along(bands.approximation)

    def up(self, matrix: Matrix, basis: WaveletBasis, low: Array) -> Operand:
        """Returns the inverse transform with zero details, ``[m, n]``."""
        band = Operand.of(low, matrix.transposed)
        return band.map(
            lambda x: lift(wide(x), matrix.m, basis.level, basis.wavelet, band.axis)
        )
