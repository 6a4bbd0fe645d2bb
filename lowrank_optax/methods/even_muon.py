"""``even_muon``: orthogonalized momentum in few bits, even over the outputs."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.methods.muon import coefficients_of
from lowrank_optax.quantization import symmetric
from lowrank_optax.transforms import (
    momentum,
    normalize_outputs,
    orthogonalize,
    quantize_state,
    scale_by_matrix_factored_rms,
)

_FULL_BLOCK = 64  # elements of a large full leaf's momentum per scale


class _Options(has.Decay, has.Matrices): ...


@method(
    "Even Muon",
    "2510.05491",
    "Li et al., NorMuon: Making Muon more efficient and scalable (2025)",
    ignored=("full_beta beside full",),
)
def even_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float | Array = 0.95,
    nesterov: bool = True,
    even: float | Array | None = 0.95,
    rms: float | Array = 0.2,
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    bits: int = 8,
    block: int = 256,
    min_size: int = 4096,
    full_beta: float | Array = 0.9,
    **options: Unpack[_Options],
) -> Transformation:
    """Muon from a momentum in few bits, its steps even over the outputs.

    For every matrix ``W [m, n]``, m its input, with gradient ``G``, at step t::

        M   = beta M + (1 - beta) G                                   kept in few bits
        N   = beta M / (1 - beta^(t+1)) + (1 - beta) G / (1 - beta^t)       (nesterov)
        O   = rms sqrt(max(m, n)) U V^T, nearly, of N = U S V^T      by ns_steps quintic
        v_j = even v_j + (1 - even) mean_i O_ij^2             corrected for its bias
        Y   = O_ij / sqrt(v_j), times |O| / |Y|
        W  <- W - lr (Y + weight_decay W)

    Elements of Y have a root mean square of about ``rms``, near Adam's, whatever the
    shape. State per matrix: ``m n (1 + 2 / block)`` bytes and ``m + n`` float32
    numbers, an eighth of AdamW's; a sixteenth in four bits. Leaves that are not chosen,
    which are vectors, embeddings and heads, get Adafactor's second moment, one number
    for every row and column, and a momentum of what it makes, in four bits where a leaf
    is large: 0.53 bytes a number.

    Args:
      beta: decay of the momentum.
      nesterov: whether the gradient counts once more.
      even: decay of the outputs' mean squares; None leaves the polar factor as it is.
      rms: root mean square of the elements of Y, whatever the shape (0.2 is about
        Adam's).
      ns_coeffs: as in ``lro.muon``.
      ns_steps: quintic steps.
      bits: 8 or 4 for the momentum. Four are rounded at random, as to the nearest a
        small momentum would not decay.
      block: elements of the momentum per scale.
      min_size: matrices and vectors with fewer elements keep float32 moments.
      full_beta: decay of the momentum of the leaves that are not chosen.
      full_scale: factor on the update of the leaves that are not chosen.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((256, 128)), "bias": jnp.ones(128)}
      >>> sizes = lro.state_bytes(lro.even_muon(3e-3), params).by_role
      >>> sizes["mu"] == 256 * 128 * (1 + 2 / 128) + 4 * 128  # the bias' is float32
      True

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024),
      https://kellerjordan.github.io/posts/muon/
      Liu et al., Muon is Scalable for LLM Training (2025),
      https://arxiv.org/abs/2502.16982

    Differences from the authors' code:
      * A composition of this package, compared with their formulas and with no code:
        NorMuon's rule behind Muon's, a momentum in few bits, Adafactor beside it.
      * The length of a step is kept as it is before ``even``; NorMuon's rule sets it to
        ``0.2 sqrt(m n)``.
    """
    its = Recipe(**options)
    _checks.choice("bits", bits, (8, 4))
    # Adafactor's, whose momentum comes behind: what it keeps has a steady size.
    full = made(
        optax.chain,
        # The gains of stacked norms are no matrix: 128 as in Optax.
        made(scale_by_matrix_factored_rms, min_dim=128),
        made(
            quantize_state,
            made(momentum, full_beta, nesterov=False),
            symmetric(4, _FULL_BLOCK),
            None,
            min_size,
            leafwise=True,
            stochastic=True,
        ),
    )
    mean = made(
        quantize_state,
        made(momentum, beta, nesterov),
        symmetric(bits, block),
        None,
        min_size,
        # One leaf is decoded at a time.
        leafwise=True,
        # To the nearest, a small momentum would not decay.
        stochastic=bits == 4,
    )
    polar = made(
        orthogonalize,
        "quintic",
        ns_steps,
        "sqrt_long",
        coefficients=coefficients_of(ns_coeffs),
        rms=rms,
    )
    tx = chain(
        its.matrices(full),
        mean,
        polar,
        *([] if even is None else [made(normalize_outputs, even)]),
        backproject(learning_rate=learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_even_muon = direction(even_muon)
