"""``adamw_8bit``: AdamW with moments in eight bits, for leaves of any shape."""

from typing import Any

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.match import CHOICES
from lowrank_optax.methods._method import method
from lowrank_optax.methods._shared import Transformation, eight_bits
from lowrank_optax.transforms import decay_before, quantize_state
from lowrank_optax.transforms.cast import without_overflow


@method("8-bit AdamW", "2110.02861", "Dettmers et al. (2021)")
def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array | None = 1e-4,
    mask: Any = None,
    *,
    block: int = 256,
    min_size: int = 4096,
    match: str | None = None,
) -> Transformation:
    """AdamW with moments in eight bits, for leaves of any shape.

    ``optax.adamw`` around ``lro.quantize_state(optax.scale_by_adam())``: N elements
    take ``2 N + 8 ceil(N / block)`` bytes of state (by rows of the last axis) in place
    of 8 N. The defaults are those of bitsandbytes, the decay that of ``optax.adamw``.

    Args:
      min_size: matrices and vectors with fewer elements keep float32 moments.
      match: None or "adamw", which is what its steps do: for callers that say it to
        every method.

    Differences from the authors' code:
      * Those of ``lro.quantize_state``.
    """
    if match is not None:
        _checks.choice("match", match, CHOICES)
    mu, nu = eight_bits(block)
    adam = optax.scale_by_adam(b1, b2, eps)
    stages: list[Any] = [
        # Adam treats every leaf by itself, so only one is decoded at a time.
        without_overflow(quantize_state(adam, mu, nu, min_size, leafwise=True)),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if weight_decay is not None:
        stages.append(decay_before(learning_rate, weight_decay, mask))
    return optax.chain(*stages)
