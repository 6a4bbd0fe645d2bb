"""Bases stored in few bits."""

import dataclasses
from typing import Any

import jax

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.projectors._protocol import At, Projector
from lowrank_optax.projectors._wrapped import Wrapped, check_basis
from lowrank_optax.quantization import (
    Codec,
    affine,
    dequantize,
    is_quantized,
    quantize,
)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedBasis(Wrapped):
    """A projector whose stored basis is encoded; see ``quantize_basis``.

    Attributes:
      codec: how it is stored.
    """

    codec: Any = None

    @property
    def orthonormal(self) -> bool:
        """No: the codec's error is larger than rounding."""
        return False

    def stored_as(self, dtype: Any) -> Projector:
        """Returns itself: codes take the place of every dtype."""
        del dtype
        return self

    def start(self, matrix: Matrix) -> Any:
        """Encodes what the projector inside starts from."""
        return self.pack(self.projector.start(matrix))

    def axes(self, matrix: Matrix) -> Any:
        """Says what the projector inside does, of the array behind each encoded one."""
        return self.projector.axes(matrix)

    def adopt(self, matrix: Matrix, basis: Any, at: At, of: Projector) -> Any:
        """Encodes what the projector inside takes over."""
        return self.pack(self.projector.adopt(matrix, basis, at, of))

    def refresh(self, matrix: Matrix, gradient: Any, stored: Any, at: At) -> Any:
        """Refreshes the decoded basis; what comes out is not encoded yet."""
        return self.projector.refresh(matrix, gradient, _decoded(stored), at)

    def pack(self, new: Any) -> Any:
        """Encodes a new basis."""
        return jax.tree.map(lambda x: quantize(x, self.codec), self.projector.pack(new))

    def basis(self, matrix: Matrix, stored: Any, at: At) -> Any:
        """Decodes the basis."""
        return self.projector.basis(matrix, _decoded(stored), at)

    def align(self, old: Any, new: Any) -> Any:
        """Chooses the signs of a new basis, before it is encoded."""
        # The old basis was used as decoded; the new one is not encoded before `pack`.
        return self.projector.align(_decoded(old), new)

    def rotation(self, old: Any, new: Any) -> Rotation:
        """Returns ``P_new^T P_old``, the old basis as it was used."""
        return self.projector.rotation(_decoded(old), new)


def quantize_basis(projector: Any, codec: Any = None) -> Projector:
    r"""Stores the bases of a projector in few bits.

    At a refresh the new basis gets its signs and is then encoded; every step projects
    and lifts with the decoded one, ``P' = decode(encode(P))``, which is orthonormal up
    to the codec's error only::

        R = P'^T G,     U = P' N

    Args:
      projector: one that keeps its basis between refreshes: ``lro.power``,
        ``lro.svd``, ``lro.sampled_svd``, ...
      codec: how it is stored; None is ``quantization.affine(bits=4, group=256)``, the
        released choice: two codes to a byte and five bytes per group. Rows of ``r``
        numbers have groups of their own.

    Returns:
      A projector.

    Raises:
      TypeError: if ``projector`` is no projector or ``codec`` no codec.
      ValueError: if the projector stores no basis, or moves it between refreshes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> four_bit = lro.quantize_basis(lro.power(rank=256))
      >>> tx = lro.galore(1e-2, projector=four_bit)
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> lro.state_bytes(tx, shapes).by_role["basis"]
      136192

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients (2024), https://arxiv.org/abs/2407.08296

    Differences from the authors' code:
      * Two codes share a byte; the released code stores one per byte.
      * New basis vectors keep the old ones' signs, as with every projector.
      * Groups lie along rows of the basis, so that its codes can be sharded;
        ``affine(blocks="flat")`` is the released order.
    """
    check_basis("quantize_basis", projector)
    codec = affine(bits=4) if codec is None else codec
    if not isinstance(codec, Codec):
        raise TypeError(
            "`codec` must be one of lowrank_optax.quantization, such as "
            f"affine(bits=4), got {codec!r}."
        )
    return QuantizedBasis(projector.rank, projector.update_proj_gap, projector, codec)


def _decoded(stored: Any) -> Any:
    return jax.tree.map(dequantize, stored, is_leaf=is_quantized)
