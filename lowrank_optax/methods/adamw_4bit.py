"""``adamw_4bit``: AdamW with moments in four bits, for leaves of any shape."""

from typing import Any

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.match import CHOICES
from lowrank_optax.methods._method import method
from lowrank_optax.methods._shared import Transformation
from lowrank_optax.quantization import companded
from lowrank_optax.transforms import decay_before, quantize_state
from lowrank_optax.transforms.cast import without_overflow


@method("4-bit AdamW", "2309.01507", "Li et al. (2023)")
def adamw_4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array | None = 1e-4,
    mask: Any = None,
    *,
    block: int = 32,
    min_size: int = 4096,
    stochastic: bool = True,
    match: str | None = None,
) -> Transformation:
    """AdamW with moments in four bits, for leaves of any shape.

    ``optax.adamw`` around ``lro.quantize_state`` with ``quantization.companded`` codecs
    of 4 bits: N elements take ``N + 8 ceil(N / block)`` bytes of state (by rows of the
    last axis) in place of 8 N. Second moments have even steps of their root, 15 of
    them, and never vanish.

    Args:
      block: elements per scale, the same ones for both moments: a first moment that is
        rounded up to a step of its block meets a second one that is no smaller than a
        step of the same.
      min_size: matrices and vectors with fewer elements keep float32 moments.
      stochastic: whether moments are rounded at random, so that small changes are made
        in the mean; False rounds to the nearest.
      match: None or "adamw", which is what its steps do: for callers that say it to
        every method.

    Differences from the authors' code:
      * Maps: theirs are a dynamic exponent for first moments in blocks of 128 and even
        steps without zero for second ones, scaled by rows and columns.
      * Rounding at random; the authors round to the nearest.
      * Those of ``lro.quantize_state``.
    """
    if match is not None:
        _checks.choice("match", match, CHOICES)
    mu, nu = companded(block, bits=4), companded(block, signed=False, bits=4)
    adam = quantize_state(
        optax.scale_by_adam(b1, b2, eps),
        mu,
        nu,
        min_size,
        leafwise=True,
        stochastic=stochastic,
    )
    stages: list[Any] = [
        without_overflow(adam),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if weight_decay is not None:
        stages.append(decay_before(learning_rate, weight_decay, mask))
    return optax.chain(*stages)
