"""The steps of `step.py` with data parallelism that sends projections of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

import lowrank_optax as lro
from examples.llama.activations import Wrap
from examples.llama.model import Params
from examples.llama.step import Layout, Steps, composed, make_steps, token_losses
from examples.llama.weights import PLAIN, Weights


def make_compressed_steps(
    definition: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    micro_batches: int = 1,
    weights: Weights = PLAIN,
    wrap_layer: Wrap | None = None,
    layout: Layout | None = None,
    axis_name: str = "data",
) -> Steps:
    """As `make_steps`, with parameters and state whole on every device of one axis.

    Rows of a micro-batch are spread over `axis_name`; any other axis of the mesh is
    left to the compiler, under `layout`. `grad_norm`, and the norm to clip by, are of
    what is sent: the gradients as the optimizer sees them.
    """
    wrap_layer = composed(layout.wrap if layout else None, wrap_layer)
    use = layout.use if layout else lambda params: params

    def train(
        stored: Any, opt_state: Any, batch: Any, key: Any = None
    ) -> tuple[Any, Any, Any]:
        tokens = jax.lax.psum(jnp.sum(batch["mask"]), axis_name)
        parts = micro_batches * jax.lax.axis_size(axis_name)

        def share(params: Params, rows: Any) -> jax.Array:
            # Every token weighs the same: the mean over parts is a sum over tokens.
            losses = token_losses(definition, use(params), rows, wrap_layer)
            return jnp.sum(losses) * parts / jnp.maximum(tokens, 1)

        gradient = lro.distributed.value_and_grad(
            share, tx, axis_name=axis_name, micro_batches=micro_batches
        )
        params = weights.load(stored)
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        loss, grads = gradient(params, opt_state, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "tokens": tokens,
            "skipped": opt_state.total_notfinite,
            "skipped_in_a_row": opt_state.notfinite_count,
        }
        return weights.apply(stored, updates, key), opt_state, metrics

    whole, rows = PartitionSpec(), PartitionSpec(None, axis_name)
    mapped = jax.shard_map(
        train,
        mesh=mesh,
        in_specs=(whole, whole, rows, whole),
        out_specs=whole,
        axis_names={axis_name},
    )

    def step(stored: Any, opt_state: Any, batch: Any, key: Any = None) -> Any:
        return mapped(stored, opt_state, batch, key)

    out = (layout.stored, layout.state, layout.rest) if layout else None
    return Steps(
        jax.jit(step, donate_argnums=(0, 1), out_shardings=out),
        make_steps(definition, tx, weights, layout=layout).evaluate,
    )
