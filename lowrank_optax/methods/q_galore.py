"""Q-GaLore: GaLore with a 4-bit basis, lazy refreshes and 8-bit moments."""

from typing import Any

import optax
from jaxtyping import Array

from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import takes
from lowrank_optax.methods.galore_8bit import galore_8bit, scale_by_galore_8bit
from lowrank_optax.projectors import Projector, lazy, power, quantize_basis, svd
from lowrank_optax.quantization import affine

_ENDLESS = 2**30


@takes(scale_by_galore_8bit, "basis_dtype")
def scale_by_q_galore(
    rank: Any = 128,
    *,
    update_proj_gap: int = 200,
    basis_bits: int = 4,
    basis_group: int = 256,
    threshold: float | Array = 0.4,
    history: int = 5,
    largest_gap: int | None = None,
    projector: Projector | None = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Q-GaLore, without learning rate and weight decay.

    Args:
      rank: see ``lro.q_galore``, like all others.
      update_proj_gap: steps from one basis to the next, at first.
      basis_bits: bits of the basis' codes.
      basis_group: entries of the basis per step.
      threshold: least mean cosine of a basis that counts as steady.
      history: cosines in the mean.
      largest_gap: bound of the gap.
      projector: how bases are formed.
      conventions: "optax" or "authors".
      **options: as in ``lro.scale_by_galore_8bit``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.q_galore``.
      ValueError: as ``lro.q_galore``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_q_galore(rank=64)
      >>> state = tx.init({"kernel": jnp.ones((256, 128))})
      >>> state.basis["kernel"].vectors.codes.shape
      (128, 32)
    """
    lazily = _projector(
        projector or _forming(rank, update_proj_gap, conventions),
        basis_bits,
        basis_group,
        threshold,
        history,
        largest_gap,
        conventions,
    )
    return scale_by_galore_8bit(
        rank, projector=lazily, basis_dtype=None, conventions=conventions, **options
    )


@takes(galore_8bit, "basis_dtype")
def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    update_proj_gap: int = 200,
    basis_bits: int = 4,
    basis_group: int = 256,
    threshold: float | Array = 0.4,
    history: int = 5,
    largest_gap: int | None = None,
    projector: Projector | None = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Q-GaLore: 4-bit bases that are refreshed lazily, and 8-bit moments.

    ``lro.galore_8bit`` with the projector ``lro.lazy(lro.quantize_basis(projector))``::

        P' = decode(encode(P))          R = P'^T G
        N  = Adam on R, its moments stored in eight bits
        W <- W - lr (scale * P' N + weight_decay * W)

    and the gap of a matrix doubles whenever the first vectors of its last ``history``
    refreshes agreed. With the basis' shorter side m, at rank r::

        state:  2 r n + 2 * 4 r ceil(n / block)                        moments
                m ceil(r / 2) + 5 m ceil(r / basis_group)              4-bit basis
                4 history + 5                                          gap and so on

    The third part of Q-GaLore, weights in eight bits that are rounded at random, does
    not belong to an optimizer: ``lro.quantize_weights``, ``lro.dequantize_weights`` and
    ``lro.stochastic_round_apply_updates`` stand around it.

    Args:
      learning_rate: a number or an Optax schedule (paper: 0.015 at 60M and 130M, 0.01
        at 350M and 1B, 0.004 at 7B).
      rank: basis vectors r, as in ``lro.galore``.
      update_proj_gap: steps from one basis to the next, until it grows (released
        scripts: 200; 500 at 7B).
      basis_bits: 4 or 8 (authors: 4).
      basis_group: entries of the basis per step (authors: 256), along its rows.
      threshold: least mean cosine of a basis that counts as steady (authors: 0.4).
      history: cosines in the mean (authors: 5).
      largest_gap: bound of the gap; None is 16 times ``update_proj_gap``, and no bound
        with ``conventions="authors"``.
      projector: how bases are formed, in place of ``lro.power(rank, update_proj_gap)``
        (``lro.svd`` in authors' mode); it is made lazy and quantized here.
      conventions: "optax", or "authors" as in ``lro.galore_8bit``, with groups over the
        row-major order of the whole basis.
      **options: as in ``lro.galore_8bit``, without ``basis_dtype``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.galore_8bit``, or if a count is no Python int.
      ValueError: as ``lro.galore_8bit``, or if a number is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> layer = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> used = lro.state_bytes(lro.q_galore(1e-2, rank=1024), layer)
      >>> used.by_role["basis"] == 4096 * 1024 // 2 + 5 * 4096 * 4 + 5 * 4 + 4
      True

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients (2024), https://arxiv.org/abs/2407.08296

    Differences from the authors' code:
      * Those of ``lro.galore_8bit``, ``lro.quantize_basis`` and ``lro.lazy``.
      * The released script trains with b2 = 0.95; the default here is its class' 0.999.
    """
    lazily = _projector(
        projector or _forming(rank, update_proj_gap, conventions),
        basis_bits,
        basis_group,
        threshold,
        history,
        largest_gap,
        conventions,
    )
    return galore_8bit(
        learning_rate,
        rank,
        projector=lazily,
        basis_dtype=None,
        conventions=conventions,
        **options,
    )


def _forming(rank: Any, update_proj_gap: int, conventions: str) -> Projector:
    authors = _recipe.is_authors(conventions)
    return (svd if authors else power)(rank, update_proj_gap)


def _projector(
    projector: Projector,
    bits: int,
    group: int,
    threshold: float | Array,
    history: int,
    largest_gap: int | None,
    conventions: str,
) -> Projector:
    authors = _recipe.is_authors(conventions)
    if authors and largest_gap is None:
        largest_gap = _ENDLESS
    codec = affine(bits, group, "flat" if authors else "last")
    return lazy(
        quantize_basis(projector, codec),
        threshold=threshold,
        history=history,
        largest_gap=largest_gap,
    )
