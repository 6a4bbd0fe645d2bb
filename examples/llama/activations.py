"""What a layer keeps for its backward pass, one way per `--activation-policy`."""

from collections.abc import Callable

import jax

from lowrank_optax import activations

Wrap = Callable[[Callable], Callable]

# Tags of what the block's matrix products made; `model.py` sets them.
PRODUCTS = ("q", "k", "v", "attn", "gate", "up")


def full(layer: Callable) -> Callable:
    """Nothing but the layer's input: all of it is computed again."""
    # The layer is the body of a loop, which the compiler cannot merge with another's.
    return jax.checkpoint(layer, prevent_cse=False)


def names(layer: Callable) -> Callable:
    """What the matrix products made, as it is."""
    policy = jax.checkpoint_policies.save_only_these_names(*PRODUCTS)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def adacc(layer: Callable) -> Callable:
    """The same and the residual stream, in 4 and 8 bits."""
    policy = activations.transformer_policy()
    return activations.compressed_checkpoint(layer, policy)


# None: the layer as it is; the gradient's own rules say what is kept.
ACTIVATIONS: dict[str, Wrap | None] = {
    "none": None,
    "full": full,
    "names": names,
    "adacc": adacc,
}
