"""``q_galore``: GaLore with a 4-bit basis, lazy refreshes and 8-bit moments."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.methods._method import direction, method, recipe_of
from lowrank_optax.methods._shared import Encoded, Recipe, Transformation
from lowrank_optax.methods.galore import galore_8bit, leading
from lowrank_optax.projectors import lazy, quantize_basis
from lowrank_optax.quantization import affine

# The released code knows no bound; the int32 of a gap ends at twice this.
ENDLESS = 2**30


@method("Q-GaLore", "2407.08296", "Zhang et al. (2024)", defaults={"eps": 1e-8})
def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    basis_bits: int = 4,
    basis_group: int = 256,
    threshold: float | Array = 0.4,
    history: int = 5,
    largest_gap: int | None = None,
    block: int = 256,
    min_size: int = 4096,
    **options: Unpack[Encoded],
) -> Transformation:
    """Q-GaLore: 4-bit bases that are refreshed lazily, and 8-bit moments.

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
      basis_bits: 4 or 8 (authors: 4).
      basis_group: entries of the basis per step (authors: 256), along its rows.
      threshold: least mean cosine of a basis that counts as steady (authors: 0.4).
      history: cosines in the mean (authors: 5).
      largest_gap: bound of the gap; None is 16 times ``update_proj_gap``, and no bound
        with ``conventions="authors"``.
      projector: how bases are formed, in place of ``lro.power(rank, update_proj_gap)``
        (``lro.svd`` in authors' mode); it is made lazy and quantized here.

    Examples:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> used = lro.state_bytes(lro.q_galore(1e-2, rank=1024), layer)
      >>> used.by_role["basis"] == 4096 * 1024 // 2 + 5 * 4096 * 4 + 5 * 4 + 4
      True

    Differences from the authors' code:
      * Those of ``lro.galore_8bit``, ``lro.quantize_basis`` and ``lro.lazy``;
        ``conventions="authors"`` groups over the row-major order of the whole basis.
      * The released script trains with b2 = 0.95; the default here is its class' 0.999.
    """
    its = Recipe(**options)
    codec = affine(basis_bits, basis_group, "flat" if its.authors else "last")
    if its.authors and largest_gap is None:
        largest_gap = ENDLESS
    # Lazy outside, so that it compares decoded vectors, which are those in use.
    options["projector"] = lazy(
        quantize_basis(leading(its, rank), codec),
        threshold=threshold,
        history=history,
        largest_gap=largest_gap,
    )
    return recipe_of(galore_8bit)(
        learning_rate, rank, block=block, min_size=min_size, **options
    )


scale_by_q_galore = direction(q_galore)
