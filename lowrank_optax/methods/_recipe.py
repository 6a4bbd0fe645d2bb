"""What the methods' recipes share: Adam, and the steps behind the bracket."""

from typing import Any

import optax

from lowrank_optax import _checks
from lowrank_optax.quantization import Codec, blockwise_int8
from lowrank_optax.transforms import (
    cast_moments,
    decay_after,
    decay_before,
    scale_by_bias_correction,
    scale_by_raw_adam,
)

CONVENTIONS = ("optax", "authors")


def is_authors(conventions: str) -> bool:
    """Checks the choice of conventions."""
    return _checks.choice("conventions", conventions, CONVENTIONS) == "authors"


def adam(
    base_optimizer: optax.GradientTransformation | None,
    b1,
    b2,
    eps,
    mu_dtype,
    nu_dtype,
    authors: bool,
) -> optax.GradientTransformationExtraArgs:
    """Returns what stands in the bracket: the user's choice, or Adam.

    In the authors' form Adam's bias correction is missing: ``correct_bias`` makes up
    for it behind the bracket.
    """
    if base_optimizer is not None:
        inner = base_optimizer
    elif authors:
        inner = scale_by_raw_adam(b1, b2, 1e-6 if eps is None else eps)
    else:
        inner = optax.scale_by_adam(b1, b2, 1e-8 if eps is None else eps)
    if mu_dtype is not None or nu_dtype is not None:
        inner = cast_moments(inner, mu_dtype, nu_dtype)
    return optax.with_extra_args_support(inner)


def correct_bias(
    direction: optax.GradientTransformationExtraArgs,
    base_optimizer: Any,
    b1,
    b2,
    authors: bool,
) -> optax.GradientTransformationExtraArgs:
    """Corrects the authors' Adam: behind the bracket, if it has a limiter."""
    if base_optimizer is not None or not authors:
        return direction
    return optax.chain(direction, scale_by_bias_correction(b1, b2))


def decay(
    tx: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    mask: Any,
    conventions: str = "optax",
) -> optax.GradientTransformationExtraArgs:
    """Adds the decay, if there is one, of the weights before or after the step."""
    if weight_decay is None:
        return tx
    form = decay_after if is_authors(conventions) else decay_before
    return optax.chain(tx, form(learning_rate, weight_decay, mask))


def eight_bit(block: int, authors: bool) -> tuple[Codec, Codec]:
    """Returns the 8-bit codecs of first and second moments."""
    if authors:
        return (
            blockwise_int8(block, signed=True, blocks="flat"),
            blockwise_int8(block, signed=False, blocks="flat", keep_nonzero=False),
        )
    return (
        blockwise_int8(block, signed=True, signed_scale=True, exact=False),
        blockwise_int8(block, signed=False, exact=False),
    )
