"""The trainer's step with each layer updated inside the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.llama.activations import Wrap
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.step import Steps, make_steps
from lowrank_optax import layerwise


def make_layerwise_steps(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    *,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    wrap_layer: Wrap | None = None,
) -> Steps:
    """Steps as `make_steps` makes them, with one layer's gradient alive at a time.

    `tx` comes without clipping and without a guard: both are the step's, and cost a
    second backward pass. One micro-batch; parameters are stored as they are. The
    metrics have `skipped` of this step alone: nothing is counted.
    """
    definition, abstract = abstract_model(config)
    layer = nnx.split(nnx.merge(definition, abstract).layers)[0]
    wrap = wrap_layer if wrap_layer is not None else lambda layer: layer

    def part(params: Any) -> Any:
        """The model with some parts real and the rest shapes."""
        return nnx.merge(definition, {**abstract, **params})

    def embed(own: Any, batch: Any) -> jax.Array:
        x = part({"embed": own}).embed(batch["tokens"])
        return x.astype(config.compute_dtype)

    wrapped = wrap(lambda x, own: (nnx.merge(layer, own)(x), None))

    def head(own: Any, x: jax.Array, batch: Any) -> jax.Array:
        model = part(own)
        logits = model.lm_head(model.norm(x)).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.sum(losses * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), 1)

    step = layerwise.train_step(
        embed,
        lambda own, x: wrapped(x, own)[0],
        head,
        tx,
        clip_norm=clip_norm,
        skip_nonfinite=skip_nonfinite,
        head_names=("norm", "lm_head"),
    )

    def train(stored: Any, opt_state: Any, batch: Any, key: Any = None) -> Any:
        del key
        if batch["mask"].shape[0] != 1:
            raise ValueError(
                "A layer-wise step takes one micro-batch; got "
                f"{batch['mask'].shape[0]}. A sum over micro-batches would keep the "
                "gradients of all layers: use --micro-batches 1, or the plain step."
            )
        micro = jax.tree.map(lambda x: x[0], batch)
        stored, opt_state, metrics = step(stored, opt_state, micro)
        skipped = metrics["skipped"].astype(jnp.int32)
        metrics |= {
            "tokens": jnp.sum(batch["mask"]),
            "skipped": skipped,
            "skipped_in_a_row": skipped,
        }
        return stored, opt_state, metrics

    plain = make_steps(definition, tx)
    return Steps(jax.jit(train, donate_argnums=(0, 1)), plain.evaluate)
