"""``muon``: orthogonalized momentum, kept in the parameter's dtype, 8 or 4 bits."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.quantization import symmetric
from lowrank_optax.transforms import (
    momentum,
    orthogonalize,
    quantize_state,
    row_momentum,
)
from lowrank_optax.transforms.orthogonalize import QUINTIC

# Five steps that differ (Dion's repository, 2025).
_PRESETS = {
    "standard": QUINTIC,
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


def coefficients_of(ns_coeffs: Any) -> Any:
    """Returns the coefficients of a preset, or those that were given."""
    if isinstance(ns_coeffs, str):
        return _PRESETS[_checks.choice("ns_coeffs", ns_coeffs, _PRESETS)]
    return ns_coeffs


class _Options(has.Decay, has.Matrices): ...


@method(
    "Muon",
    "2502.16982",
    "Liu et al., Muon is Scalable for LLM Training (2025)",
    ignored=(
        "adam_b1, adam_b2, eps beside full",
        "block, min_size without bits",
        "nesterov beside fraction",
    ),
)
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ns_coeffs: Any = "standard",
    ns_steps: int = 5,
    beta: float | Array = 0.95,
    nesterov: bool = True,
    consistent_rms: float | Array | None = None,
    fraction: int | float | None = None,
    bits: int | None = None,
    block: int = 256,
    min_size: int = 4096,
    adam_b1: float | Array = 0.9,
    adam_b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    **options: Unpack[_Options],
) -> Transformation:
    """Muon: momentum, orthogonalized, for matrices; Adam for the rest.

    For every matrix ``W [m, n]``, m its input, with gradient ``G``, at step t::

        M  = beta M + (1 - beta) G                                         [m, n]
        N  = beta M / (1 - beta^(t+1)) + (1 - beta) G / (1 - beta^t)       (nesterov)
        O  = U V^T, nearly, of N = U S V^T                    by ns_steps quintic steps
        W <- W - lr (f O + weight_decay W)
        f  = sqrt(max(1, n / m)),    or  consistent_rms sqrt(max(m, n))

    The update is that of ``optax.contrib.muon``, whose names these are. State per
    matrix: ``m n`` numbers, half of Adam's; with ``bits=8`` a quarter of that again,
    ``m n (1 + 2 / block)`` bytes. Four bits are rounded at random, as to the nearest a
    small momentum would not decay.

    Stacks, experts, attention kernels and convolutions are matrices by
    ``lro.project``'s rule. Embeddings, heads and vectors get Adam, with Nesterov's
    momentum likewise. On a mesh, ``layer_axis`` and ``param_shardings`` have a stack
    orthogonalized layer by layer, so that one layer at a time is gathered.

    Args:
      ns_coeffs: "standard", "dion", or the three coefficients of a step, or as many
        triples as steps.
      ns_steps: quintic steps.
      beta: decay of the momentum.
      nesterov: whether the gradient counts once more.
      consistent_rms: root mean square of the elements of ``f O``, whatever the shape
        (0.2 is about Adam's); None for the factor by width.
      fraction: of the rows (of the shorter side) that move in a step, those with the
        largest momentum, which is a sum then and decays by ``beta`` where it was used
        (Dion2, ``lro.row_momentum``); None moves all.
      bits: 8 or 4 for the momentum of matrices; Adam's moments are then in 8 bits
        (``lro.quantize_state``). None keeps all in ``state_dtype``.
      block: elements of the momentum per scale.
      adam_b1: of Adam on the leaves that are not chosen.
      adam_b2: of the same.
      eps: of the same.
      full_scale: factor on the update of the leaves that are not chosen, their
        learning rate per unit of Muon's.

    Raises:
      ValueError: if ``bits`` or ``ns_coeffs`` is something else.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((256, 128)), "bias": jnp.ones(128)}
      >>> lro.state_bytes(lro.muon(2e-2), params).by_role["mu"] == 4 * (256 + 1) * 128
      True
      >>> mu = lro.state_bytes(lro.muon(2e-2, bits=8), params).by_role["mu"]
      >>> mu == 256 * 128 * (1 + 2 / 128) + 4 * 128  # blocks of a whole row
      True

    References:
      Dion2: A Simple Method to Shrink Matrix in Muon (2025),
      https://arxiv.org/abs/2512.16928
      Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024),
      https://kellerjordan.github.io/posts/muon/

    Differences from the authors' code:
      * Weight decay is one for all leaves; there, matrices and others have their own
        (``mask``).
      * What is a matrix is concluded from all leaves; Optax takes every leaf of two
        axes, embeddings and heads, too, and no other.
      * A gradient's size does not matter: the norm that N is divided by has no eps.
      * ``adaptive`` and other ``preconditioning`` are not built.
    """
    its = Recipe(**options)
    coefficients = coefficients_of(ns_coeffs)
    _checks.choice("bits", bits, (None, 8, 4))
    if fraction is None:
        mean = made(momentum, beta, nesterov)
    else:
        mean = made(row_momentum, fraction, beta)
    # Optax gives the other leaves the same look ahead.
    adam = made(optax.scale_by_adam, adam_b1, adam_b2, eps, nesterov=nesterov)
    if bits is not None:
        # Both treat every leaf by itself, so only one is decoded at a time.
        mean = made(
            quantize_state,
            mean,
            symmetric(bits, block),
            None,
            min_size,
            # What asks the view for its axes wants the whole tree.
            leafwise=fraction is None,
            stochastic=bits == 4,
        )
        adam = made(
            quantize_state, adam, *has.eight_bits(block), min_size, leafwise=True
        )
    shape = "width" if consistent_rms is None else "sqrt_long"
    tx = chain(
        its.matrices(adam),
        mean,
        made(
            orthogonalize,
            "quintic",
            ns_steps,
            shape,
            coefficients=coefficients,
            rms=1.0 if consistent_rms is None else consistent_rms,
        ),
        backproject(learning_rate=learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_muon = direction(muon)
