"""AdamW with moments in eight bits."""

from typing import Any

import optax
from jaxtyping import Array

from lowrank_optax.methods import _recipe
from lowrank_optax.transforms import quantize_state


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
) -> optax.GradientTransformation:
    r"""AdamW with moments in eight bits, for leaves of any shape.

    ``optax.adamw`` around ``lro.quantize_state(optax.scale_by_adam())``: N elements
    take ``2 N + 8 ceil(N / block)`` bytes of state (by rows of the last axis) in place
    of 8 N.

    Args:
      learning_rate: a number or an Optax schedule.
      b1: decay of the first moment (bitsandbytes: 0.9).
      b2: decay of the second moment (bitsandbytes: 0.999).
      eps: added to the corrected root (bitsandbytes: 1e-8).
      weight_decay: decoupled decay per unit of learning rate (``optax.adamw``: 1e-4);
        None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      block: elements per scale (bitsandbytes: 256).
      min_size: matrices and vectors with fewer elements keep float32 moments
        (bitsandbytes: 4096).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``block`` or ``min_size`` is no Python int.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 256))}
      >>> lro.state_bytes(lro.adamw_8bit(1e-3), params).by_role["mu"] - 64 * 256
      256

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021),
      https://arxiv.org/abs/2110.02861

    Differences from the authors' code:
      * Those of ``lro.quantize_state``.
    """
    mu, nu = _recipe.eight_bit(block, authors=False)
    stages: list[Any] = [
        quantize_state(
            optax.scale_by_adam(b1, b2, eps), mu, nu, min_size, leafwise=True
        )
    ]
    if weight_decay is not None:
        stages.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*stages, optax.scale_by_learning_rate(learning_rate))
