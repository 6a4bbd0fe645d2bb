"""The trainer's step with each layer updated inside the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.llama.activations import Wrap
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.step import Layout, Steps, composed, make_steps
from lowrank_optax import layerwise


def make_layerwise_steps(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    *,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    wrap_layer: Wrap | None = None,
    layout: Layout | None = None,
) -> Steps:
    """Steps as `make_steps` makes them, with one layer's gradient alive at a time.

    `tx` comes without clipping and without a guard: both are the step's, and cost a
    second backward pass. Parameters are stored as they are. The state is of `tx`, or
    of `optimizers.guarded` around it, so a plain run's checkpoint goes on; only that
    state counts skipped steps.
    """
    definition, abstract = abstract_model(config)
    layer = nnx.split(nnx.merge(definition, abstract).layers)[0]
    wrap = composed(layout.wrap if layout else None, wrap_layer)
    use = layout.use if layout else lambda params: params

    def part(params: Any) -> Any:
        """The model with some parts real and the rest shapes."""
        return nnx.merge(definition, {**abstract, **params})

    def embed(own: Any, batch: Any) -> jax.Array:
        x = part(use({"embed": own})).embed(batch["tokens"])
        return x.astype(config.compute_dtype)

    def block(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
        return nnx.merge(layer, own)(x), None

    wrapped = wrap(block) if wrap else block

    def head(own: Any, x: jax.Array, batch: Any) -> jax.Array:
        model = part(own)
        logits = model.lm_head(model.norm(x)).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.sum(losses * batch["weight"])

    def step(params: Any, state: Any, batch: Any) -> Any:
        """The mean over micro-batches is that over all real tokens."""
        count, mask = batch["mask"].shape[0], batch["mask"]
        batch = batch | {"weight": mask * (count / jnp.maximum(jnp.sum(mask), 1))}
        return layerwise.train_step(
            embed,
            lambda own, x: wrapped(x, own)[0],
            head,
            tx,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            micro_batches=count if count > 1 else None,
            head_names=("norm", "lm_head"),
        )(params, state, batch if count > 1 else jax.tree.map(lambda x: x[0], batch))

    def train(stored: Any, opt_state: Any, batch: Any, key: Any = None) -> Any:
        del key
        guarded = isinstance(opt_state, optax.ApplyIfFiniteState)
        own = opt_state.inner_state[-1] if guarded else opt_state
        stored, own, metrics = step(stored, own, batch)
        skipped = metrics["skipped"].astype(jnp.int32)
        in_a_row, total = skipped, skipped
        if guarded:
            in_a_row = skipped * (opt_state.notfinite_count + 1)
            total = opt_state.total_notfinite + skipped
            inner = (*opt_state.inner_state[:-1], own)
            own = opt_state._replace(
                notfinite_count=in_a_row,
                last_finite=skipped == 0,
                total_notfinite=total,
                inner_state=inner,
            )
        metrics |= {
            "tokens": jnp.sum(batch["mask"]),
            "skipped": total,
            "skipped_in_a_row": in_a_row,
        }
        return stored, own, metrics

    out = (layout.stored, layout.state, layout.rest) if layout else None
    return Steps(
        jax.jit(train, donate_argnums=(0, 1), out_shardings=out),
        make_steps(definition, tx, layout=layout).evaluate,
    )
