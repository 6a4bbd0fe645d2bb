"""`make_steps` compiles one optimizer step and one validation batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import lowrank_optax as lro
from examples.llama.config import Resolved
from examples.llama.model import Params, Wrap

# Of a definition, parameters, a batch and a wrap: `[B, ...]`, 0 where `mask` is.
Losses = Callable[..., jax.Array]

# Names in the compiled program, which say whose a collective is.
MODEL, OPTIMIZER = "model", "optimizer"
PLAIN = lro.weight_storage("plain")


class Steps(NamedTuple):
    """`train(stored, state, batch, key, frozen)`, `evaluate(stored, batch, frozen)`.

    `frozen` are the model's other parameters, which stay; left out: there are none.
    """

    train: Any  # compiled functions
    evaluate: Any


class Layout(NamedTuple):
    """Shardings of what a step reads and makes, and what else it takes to compute so.

    `params` are those of the parameters and their gradients, `stored` of what is kept
    of them between steps, `state` of the optimizer's state, `rest` of all else. The
    forward pass is that of `use(params)`, with each layer in `wrap`. `mesh` is None on
    one device. `near` is where a step has the state, if it lies elsewhere in between.
    """

    params: Any
    stored: Any
    state: Any
    rest: Any
    wrap: Wrap | None = None
    use: Callable[[Params], Params] = lambda params: params
    mesh: Mesh | None = None
    near: Any = None

    def fetched(self, opt_state: Any) -> Any:
        """The state where a step can compute with it."""
        return opt_state if self.near is None else jax.device_put(opt_state, self.near)


def from_afar(train: Callable[..., Any], layout: Layout | None) -> Callable[..., Any]:
    """The same step on a state that may lie in another memory."""
    if layout is None:
        return train
    return lambda stored, opt_state, *of: train(stored, layout.fetched(opt_state), *of)


def token_losses(
    definition: Any, params: Params, batch: Any, wrap_layer: Wrap | None = None
) -> jax.Array:
    """Negative log likelihood of every target `[B, S]`, 0 where masked."""
    options: dict[str, Any] = {} if wrap_layer is None else {"wrap_layer": wrap_layer}
    if "segments" in batch:  # documents that must not see each other
        options["segments"] = batch["segments"]
    logits = nnx.merge(definition, params)(batch["tokens"], **options)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return losses * batch["mask"]


def row_sums(losses: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Loss and number of targets of every row, for the host to add up in float64.

    In whatever batches the rows came, their sums are the same.
    """
    return jnp.sum(losses, axis=1), jnp.sum(batch["mask"], axis=1)


def joined(trained: Params, frozen: Params) -> Params:
    """One tree of two nested dicts that have no leaf in common."""
    both = dict(trained)
    for name, value in frozen.items():
        both[name] = joined(both[name], value) if name in both else value
    return both


def mean_gradient(
    definition: Any,
    params: Params,
    batch: Any,
    wrap_layer: Wrap | None = None,
    losses: Losses = token_losses,
) -> tuple[Any, Params]:
    """Loss and gradient, the mean over all real tokens of all micro-batches.

    Each leaf of `batch` is `[micro-batches, rows, positions]`. Every token weighs the
    same however the micro-batches cut the rows: sums are divided by the step's tokens.
    """
    tokens = jnp.maximum(jnp.sum(batch["mask"]), 1)

    def share(params: Params, micro: Any) -> jax.Array:
        return jnp.sum(losses(definition, params, micro, wrap_layer)) / tokens

    value_and_grad = jax.value_and_grad(share)
    if batch["mask"].shape[0] == 1:
        # Without a loop there are no sums in float32 beside the gradient.
        return value_and_grad(params, jax.tree.map(lambda x: x[0], batch))

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        part = value_and_grad(params, micro)
        return jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, part), None

    # In float32: a bfloat16 sum would lose the later, smaller parts.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(()), zeros), batch)
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def mean_loss(
    definition: Any,
    params: Params,
    batch: Any,
    wrap_layer: Wrap | None = None,
    losses: Losses = token_losses,
) -> jax.Array:
    """The loss that `mean_gradient` differentiates, of all micro-batches."""

    def add(total: jax.Array, micro: Any) -> tuple[jax.Array, None]:
        return total + jnp.sum(losses(definition, params, micro, wrap_layer)), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), batch)
    return total / jnp.maximum(jnp.sum(batch["mask"]), 1)


def make_steps(
    definition: Any,
    tx: optax.GradientTransformation,
    weights: lro.WeightStorage = PLAIN,
    wrap_layer: Wrap | None = None,
    layout: Layout | None = None,
    losses: Losses = token_losses,
    measure: Callable[..., Any] | None = None,
    estimated: bool = False,
    watched: bool = False,
) -> Steps:
    """Compiled steps of a model under an optimizer with the guard outermost.

    Parameters that are stored as they are (`PLAIN`) need no key. `wrap_layer` says what
    layers keep for the backward pass; the evaluation has none. `layout` cuts all of it
    over a mesh; without one the compiler is left alone. An evaluation returns what
    `measure(definition, params, batch)` says of every row; left out: the sums of its
    losses. With `estimated` there is no backward pass: `tx` begins, behind the guard,
    with what makes a gradient of `loss_fn`, and leaves loss and norm in its state.
    With `watched` the metrics say what share of the gradient the bases of `tx` hold.
    """
    on_mesh = layout.wrap if layout else None
    use = layout.use if layout else lambda params: params
    out = (layout.stored, layout.state, layout.rest) if layout else None
    wrap_layer = composed(on_mesh, wrap_layer)

    def whole(frozen: Params | None) -> Losses:
        """The losses as a function of what is trained."""
        if not frozen:
            return losses
        rest = use(frozen)
        return lambda definition, params, *of: losses(
            definition, joined(params, rest), *of
        )

    def train(
        stored: Any, opt_state: Any, batch: Any, key: Any = None, frozen: Any = None
    ) -> tuple[Any, Any, Any]:
        params = weights.load(stored)
        if estimated:
            return estimate(stored, params, opt_state, batch, key, frozen)
        with jax.named_scope(MODEL):
            loss, grads = mean_gradient(
                definition, use(params), batch, wrap_layer, whole(frozen)
            )
            # Gradients lie where their parameters do; nothing else says so to the
            # compiler.
            if layout is not None and layout.mesh is not None:
                grads = jax.lax.with_sharding_constraint(grads, layout.params)
        norm = optax.tree.norm(grads)
        with jax.named_scope(OPTIMIZER):
            # The guard looks at entries. Finite ones whose squares are not would reach
            # the second moments: they count as not finite, and as a skipped step.
            grads = jax.tree.map(lambda g: jnp.where(norm < jnp.inf, g, jnp.nan), grads)
            updates, opt_state = tx.update(grads, opt_state, params)
        more = {}
        if watched:
            more["captured_energy"] = captured_energy(tx, grads, opt_state, params)
        return applied(stored, updates, opt_state, batch, key, loss, norm, more)

    def estimate(
        stored: Any, params: Any, opt_state: Any, batch: Any, key: Any, frozen: Any
    ) -> tuple[Any, Any, Any]:
        def loss_fn(params: Params) -> jax.Array:
            args = definition, use(params), batch, wrap_layer, whole(frozen)
            return mean_loss(*args)

        nothing = jax.tree.map(jnp.zeros_like, params)
        update: Any = optax.with_extra_args_support(tx).update
        updates, opt_state = update(nothing, opt_state, params, loss_fn=loss_fn)
        seen = opt_state.inner_state[0]
        return applied(stored, updates, opt_state, batch, key, seen.loss, seen.norm, {})

    def applied(
        stored: Any,
        updates: Any,
        opt_state: Any,
        batch: Any,
        key: Any,
        loss: Any,
        norm: Any,
        more: dict[str, Any],
    ) -> tuple[Any, Any, Any]:
        metrics = more | {
            "loss": loss,
            "grad_norm": norm,
            "tokens": jnp.sum(batch["mask"]),
            "skipped": opt_state.total_notfinite,
            "skipped_in_a_row": opt_state.notfinite_count,
        }
        with jax.named_scope(OPTIMIZER):
            stored = weights.apply(stored, updates, key)
        return stored, opt_state, metrics

    def evaluate(stored: Any, batch: Any, frozen: Any = None) -> Any:
        params = joined(use(weights.load(stored)), use(frozen or {}))
        if measure is not None:
            return measure(definition, params, batch)
        return row_sums(losses(definition, params, batch, on_mesh), batch)

    return Steps(
        jax.jit(from_afar(train, layout), donate_argnums=(0, 1), out_shardings=out),
        jax.jit(evaluate, out_shardings=layout.rest if layout else None),
    )


def captured_energy(
    tx: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params
) -> jax.Array:
    """The share of a gradient's energy in its basis, the mean over all matrices."""
    shares = lro.captured_energy(tx, grads, opt_state, params)
    return jnp.mean(jnp.concatenate([x.ravel() for x in shares.values()]))


def composed(outer: Wrap | None, inner: Wrap | None) -> Wrap | None:
    """One wrap around the other."""
    if outer is None or inner is None:
        return outer or inner
    return lambda layer: outer(inner(layer))


def abstract_batch(config: Resolved, sharding: Any = None) -> dict[str, Any]:
    """Shapes of what a training step takes, `[micro-batches, rows, positions]`."""
    rows = config.batch_size // config.micro_batches
    shape = config.micro_batches, rows, config.seq_len
    types = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in types.items()
    }


def split_rows(batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, Any]:
    """`[B, S]` leaves to `[micro_batches, B / micro_batches, S]`."""
    return {k: v.reshape(micro_batches, -1, v.shape[-1]) for k, v in batch.items()}
