"""`choose_steps` makes the steps that the flags ask for, with the state of plain ones.

These are plain ones (`step.py`), with `--layerwise` one layer after another, or with
`--compressed` such as send projections of gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import Mesh, PartitionSpec

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.config import SENDS, Resolved, UsageError
from examples.llama.model import (
    ModelConfig,
    Params,
    Wrap,
    abstract_model,
)
from examples.llama.positions import find_segments
from examples.llama.step import (
    PLAIN,
    Layout,
    Steps,
    abstract_batch,
    composed,
    from_afar,
    make_steps,
    token_losses,
)
from examples.llama.task import Task
from lowrank_optax import layerwise

PADDING = {"tpu"}  # platforms whose arrays are padded to tiles


def choose_steps(
    task: Task,
    optimizer: optax.GradientTransformation,
    weights: lro.WeightStorage,
    layout: Layout,
    wrap_layer: Wrap | None = None,
) -> Steps:
    """The steps that the flags ask for, all with the state of `optimizers.guarded`.

    Raises:
        UsageError: the optimizer cannot be stepped so; nothing is computed yet.
    """
    on_mesh = layout if layout.mesh or layout.near else None
    config, params = task.config, task.params
    tx = optimizers.guarded(config, optimizer, task.estimate)
    if config.layerwise:
        steps = steps_by_layers(config, task.model, optimizer, wrap_layer, layout)
        _trace(steps, config, params, jax.eval_shape(tx.init, params))
        return steps
    if config.compressed:
        traffic(config, optimizer, params)
        assert layout.mesh is not None  # choose_placement has seen to it
        parts = config.micro_batches
        return make_compressed_steps(
            task.definition, tx, layout.mesh, parts, weights, wrap_layer, on_mesh
        )
    return make_steps(
        task.definition,
        tx,
        weights,
        wrap_layer,
        on_mesh,
        task.losses,
        task.measure,
        estimated=task.estimate is not None,
        # For who draws it: it costs one more projection a step.
        watched=bool(config.log_to) and optimizers.projects(optimizer, params),
    )


def steps_by_layers(
    config: Resolved,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    wrap_layer: Wrap | None,
    layout: Layout,
) -> Steps:
    """Layer-wise steps with the clipping of the flags, and the guard."""
    return make_layerwise_steps(
        model,
        optimizer,
        clip_norm=config.clip or None,
        skip_nonfinite=True,
        wrap_layer=wrap_layer,
        layout=layout,
    )


def _trace(steps: Steps, config: Resolved, params: Any, state: Any) -> None:
    """The step refuses an optimizer while it is traced."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        jax.eval_shape(steps.train, params, state, abstract_batch(config), key)
    except ValueError as error:
        raise UsageError(f"--layerwise with {config.optimizer}: {error}") from error


def traffic(
    config: Resolved, optimizer: optax.GradientTransformation, params: Any
) -> lro.distributed.TrafficReport:
    """What `--compressed` sends of every gradient.

    Raises:
        UsageError: no projection is ever sent.
    """
    sending = ", ".join(name for name in SENDS if name != config.optimizer)
    others = f"methods that send projections: {sending}"
    try:
        report = lro.distributed.traffic_report(optimizer, params)
    except ValueError as error:  # no bracket
        raise UsageError(
            f"--compressed: {config.optimizer} projects nothing; {others}"
        ) from error
    if not report.compressed:
        row = next(row for row in report.rows if len(row.shape) == 3)
        raise UsageError(
            f"--compressed: {config.optimizer} sends every gradient whole "
            f"({row.path}: {row.reason}); {others}"
        )
    return report


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

    def embed(own: Any, batch: Any) -> dict[str, jax.Array]:
        x = {"hidden": part(use({"embed": own})).enter(batch["tokens"])}
        if "segments" in batch:
            # As real numbers, since all that goes through the layers comes back as a
            # cotangent, and integers have none.
            x["segments"] = batch["segments"].astype(jnp.float32)
        return x

    def block(own: Any, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        documents = None
        if "segments" in x:
            documents = find_segments(x["segments"].astype(jnp.int32))

        def one(hidden: jax.Array, own: Any) -> tuple[jax.Array, None]:
            return nnx.merge(layer, own)(hidden, documents), None

        hidden, _ = (wrap(one) if wrap else one)(x["hidden"], own)
        return x | {"hidden": hidden}

    def head(own: Any, x: Any, batch: Any, *table: Any) -> jax.Array:
        tied = {"embed": table[0]} if table else {}
        model = part(own | use(tied))
        logits = model.logits(model.norm(x["hidden"]))
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
            block,
            head,
            tx,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            micro_batches=count if count > 1 else None,
            head_names=("norm",) if config.tied else ("norm", "lm_head"),
            tied=config.tied,
        )(params, state, batch if count > 1 else jax.tree.map(lambda x: x[0], batch))

    def train(stored: Any, opt_state: Any, batch: Any, key: Any = None) -> Any:
        del key
        guarded = isinstance(opt_state, optax.ApplyIfFiniteState)
        # `optimizers.guarded` has tx last in its chain, behind the clipping.
        own = opt_state.inner_state[-1] if guarded else opt_state
        stored, own, metrics = step(stored, own, batch)
        skipped = metrics["skipped"].astype(jnp.int32)
        in_a_row, total = skipped, skipped
        if guarded:
            # Counted as `optax.apply_if_finite` does, for a plain run to go on with.
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
        jax.jit(from_afar(train, layout), donate_argnums=(0, 1), out_shardings=out),
        make_steps(definition, tx, layout=layout).evaluate,
    )


def layers_outermost(
    layout: Layout,
    tx: optax.GradientTransformation,
    weights: lro.WeightStorage,
    params: Any,
) -> Layout:
    """The same, with every layer of a stack in one piece where that is not a given.

    A TPU pads the last two axes, and its compiler may lay layers inside to pad less.
    """
    shapes = jax.eval_shape(weights.store, params), jax.eval_shape(tx.init, params)
    if layout.near is not None:  # the host's memory has no tiles to pad
        return layout
    if {device.platform for device in layout.rest.device_set} <= PADDING:
        stored, state = layerwise.formats(shapes, (layout.stored, layout.state))
        return layout._replace(stored=stored, state=state)
    return layout


def laid_out(tree: Any, places: Any) -> Any:
    """Moves arrays to their layouts, one after another; the old ones are deleted."""

    def move(x: Any, place: Any) -> Any:
        if not isinstance(place, Format) or _order(x.format) == _order(place):
            return x
        moved = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=place)(x))
        x.delete()
        return moved

    return jax.tree.map(move, tree, places)


def _order(format: Format) -> Any:
    layout: Any = format.layout
    return layout.major_to_minor


def make_compressed_steps(
    definition: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    micro_batches: int = 1,
    weights: lro.WeightStorage = PLAIN,
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
        # `value_and_grad` cuts the rows of this device into micro-batches itself.
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
        jax.jit(from_afar(step, layout), donate_argnums=(0, 1), out_shardings=out),
        make_steps(definition, tx, weights, layout=layout).evaluate,
    )
