"""``train_step``: backward pass and update, one layer at a time.

Parameters and state keep the stacked layout of the plain step and are updated in
place: what a ``lax.fori_loop`` carries aliases, the ``xs`` and ``ys`` of a ``lax.scan``
do not.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.layerwise.stacks import like_params, parts_of
from lowrank_optax.layerwise.update import LayerUpdate, count_layers, gain_of, squares
from lowrank_optax.linalg.products import wider

Step = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, Array]]]


def train_step(
    embed: Callable[[Any, Any], Any],
    block: Callable[[Any, Any], Any],
    head: Callable[..., Array],
    tx: optax.GradientTransformation,
    *,
    clip_norm: float | None = None,
    clip_by: str = "global",
    skip_nonfinite: bool = False,
    micro_batches: int | None = None,
    head_names: tuple[str, ...] | None = None,
    tied: bool = False,
) -> Step:
    """Returns a training step that updates each layer inside the backward pass.

    With ``x_0 = embed(e, batch)``, ``x_{i+1} = block(p_i, x_i)`` and the loss
    ``head(h, x_L, batch)``, the step updates h, then ``p_{L-1}, ..., p_0``, then e,
    each as soon as its gradient is known. Gradients, state and result are those of
    ``jax.value_and_grad`` and ``tx.update`` on the whole tree; counters advance once.

    Args:
      embed: ``embed(params["embed"], batch) -> x``.
      block: ``block(layer, x) -> x``, where ``layer`` is ``params["layers"]`` without
        its leading axis; ``jax.checkpoint`` around it is welcome.
      head: ``head(params["head"], x, batch) -> loss``, a scalar.
      tx: an optimizer that treats leaves, and layers of a leaf, independently.
        Low-rank methods need ``layer_axis=0``. Random numbers whose keys follow from
        the number of leaves (``optax.add_noise``) are others than in a plain step. Of
        its transformations those that take extra arguments find one more,
        ``layer``, with the ``index`` of the layer that is updated and the number of
        ``layers``, when it is one's turn.
      clip_norm: largest norm of the gradient.
      clip_by: "global": by the norm of the whole gradient, measured exactly in a
        backward pass of its own. "part": each layer, the embedding and the head by
        its own norm, without a second pass; not what a clip in the plain step does.
      skip_nonfinite: leave everything as it was when the gradient's norm is not
        finite; costs the same backward pass.
      micro_batches: the leading axis of every array in ``batch``. The loss is the mean
        of theirs; the gradient of a part is summed over them in float32 before its
        update, so that of one layer is still all there is.
      head_names: names of the head's parts in ``params`` where there is no ``"head"``;
        ``head`` is given a dict of them.
      tied: the head reads the embedding, too, ``head(h, x, batch, params["embed"])``.
        The embedding's gradient is the sum of both, so what comes from the head is kept
        until the layers are done.

    Returns:
      ``step(params, state, batch) -> (params, state, metrics)`` with state as in
      ``tx.init(params)`` and metrics ``loss``, ``grad_norm`` (before clipping) and
      ``skipped``. Jit it with ``donate_argnums=(0, 1)``.

    Raises:
      ValueError: when ``step`` is traced, if ``params`` has other parts, layers
        disagree in their number, or ``tx`` mixes the parts or cannot be cut into
        layers. The parts are told apart in the traced update: what it needs of the
        gradients, parameters and numbers of other parts for the results of one. Layers
        are told apart by runs on small random numbers: all results but the first
        layer's must stay within 1e-4 when the first layer has other, very large and
        non-finite gradients, and updates must be those of layers that come one by one.
        Every run goes on until something moves, for 64 steps at most; a coupling that
        sets in later is not seen. Trees of one structure are asked about once.

    Examples:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {
      ...     "embed": jnp.ones((4, 8)),
      ...     "layers": {"kernel": jnp.ones((3, 8, 8)) / 8},
      ...     "head": jnp.ones((8, 1)),
      ... }
      >>> tx = lro.galore(1e-2, rank=2, layer_axis=0)
      >>> step = lro.layerwise.train_step(
      ...     lambda e, batch: batch @ e,
      ...     lambda p, x: x + jnp.tanh(x @ p["kernel"]),
      ...     lambda h, x, batch: jnp.mean((x @ h) ** 2),
      ...     tx,
      ... )
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> params, state, metrics = step(params, tx.init(params), jnp.ones((2, 4)))
      >>> int(state.count), params["layers"]["kernel"].shape
      (1, (3, 8, 8))

    References:
      Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited
      Resources (2023), https://arxiv.org/abs/2306.09782
    """
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"clip_norm must be positive or None; got {clip_norm!r}.")
    _checks.choice("clip_by", clip_by, ("global", "part"))
    if micro_batches is not None:
        _checks.positive_int("micro_batches", micro_batches)
    names = ("head",) if head_names is None else tuple(head_names)
    pull = _whole if micro_batches is None else _summed
    accepted: set[Any] = set()  # structures and shapes, each asked about once

    def run(fn: Callable, p: Any, x: Any, batch: Any) -> Any:
        if micro_batches is None:
            return fn(p, x, batch)
        # A loop holds the inner activations of one micro-batch at a time.
        return jax.lax.map(lambda one: fn(p, *one), (x, batch))

    def first(part: Any, x: Any, batch: Any) -> Any:
        del x
        return embed(part, batch)

    def middle(part: Any, x: Any, batch: Any) -> Any:
        del batch
        return block(part, x)

    def last(read: Any, x: Any, batch: Any) -> Array:
        part, *table = read
        own = part if head_names is not None else part["head"]
        return head(own, x, batch, *table)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, dict[str, Array]]:
        layers = count_layers(params, names)
        update = LayerUpdate(tx, params, state, layers, names)
        if update.kind not in accepted:
            update.refuse_coupling()
            accepted.add(update.kind)
        _check_micro_batches(batch, micro_batches)
        given = parts_of(params)
        head_params = {name: given[name] for name in names}
        read = (head_params, given["embed"]) if tied else (head_params,)

        def layer(x: Any, p: Any) -> tuple[Any, Any]:
            # All that is kept of a block is its input: the backward pass runs it again.
            return run(middle, p, x, batch), x

        x = run(first, given["embed"], None, batch)
        x, inputs = jax.lax.scan(layer, x, given["layers"])
        like = jax.eval_shape(functools.partial(run, last), read, x, batch)
        # The cotangent of a mean: a share of 1 for each micro-batch's loss
        share = jnp.full(like.shape, 1 / max(like.size, 1), like.dtype)
        losses, (head_grad, *tied_grad), cotangent = pull(last, read, x, batch, share)

        def backward(stack: Any, i: Array, cotangent: Any) -> tuple[Any, Any]:
            p, x = _at(stack, i), _at(inputs, i)
            return pull(middle, p, x, batch, cotangent)[1:]

        def bottom(cotangent: Any) -> Any:
            grad = pull(first, given["embed"], None, batch, cotangent)[1]
            return jax.tree.map(lambda *uses: sum(uses[1:], uses[0]), grad, *tied_grad)

        norm, gain = None, None
        ahead = clip_norm is not None and clip_by == "global"
        if ahead or skip_nonfinite:

            def measure(at: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
                cotangent, total = carry
                grad, cotangent = backward(given["layers"], layers - 1 - at, cotangent)
                return cotangent, total + squares(grad)

            lowest, total = jax.lax.fori_loop(
                0, layers, measure, (cotangent, squares(head_grad))
            )
            norm = jnp.sqrt(total + squares(bottom(lowest)))
            if ahead:
                gain = gain_of(norm, clip_norm)
        keep = ~jnp.isfinite(norm) if norm is not None and skip_nonfinite else None
        own_norm = None if ahead else clip_norm
        apply = functools.partial(update, gain=gain, keep=keep, own_norm=own_norm)

        # All parts start from the shared state of before, and one result is kept: so
        # counters advance once.
        old = update.shared(state)
        new_head, head_state, new_shared = apply(names, head_grad, head_params, state)

        def descend(at: Array, carry: Any) -> Any:
            stack, own, _, cotangent, total = carry
            i = layers - 1 - at
            grad, cotangent = backward(stack, i, cotangent)
            total = total + squares(grad)
            grad = jax.tree.map(lambda g: g[None], grad)
            # Read before anything is written: else the compiler copies the stacks.
            p, s, grad = jax.lax.optimization_barrier(
                (_slice(stack, i), _slice(own, i), grad)
            )
            p, s, shared = apply(
                ("layers",), {"layers": grad}, {"layers": p}, {**old, **s}, index=i
            )
            single = {path: shared[path] for path in update.single}
            stack, own = _put(stack, p["layers"], i), _put(own, s, i)
            return stack, own, single, cotangent, total

        start = (
            given["layers"],
            update.own("layers", state),
            {path: old[path] for path in update.single},
            cotangent,
            squares(head_grad),
        )
        stack, own, single, cotangent, total = jax.lax.fori_loop(
            0, layers, descend, start
        )
        embed_grad = bottom(cotangent)
        new_embed, embed_state, _ = apply(
            ("embed",), {"embed": embed_grad}, {"embed": given["embed"]}, state
        )
        if norm is None:
            norm = jnp.sqrt(total + squares(embed_grad))
        parts = {**new_head, **new_embed, "layers": stack}
        leaves = {**new_shared, **single, **head_state, **own, **embed_state}
        metrics = {
            "loss": jnp.mean(losses),
            "grad_norm": norm,
            "skipped": jnp.bool_(False) if keep is None else keep,
        }
        return like_params(params, parts), update.join(state, leaves), metrics

    return step


def formats(tree: Any, shardings: Any) -> Any:
    """Returns layouts in which every layer of a stack lies in one piece of memory.

    A compiler may lay ``[L, m, n]`` out with the layers inside, to pad less where n is
    no multiple of 128. A loop that updates single layers then copies the whole stack
    before and after. With these layouts for arguments and results of the jitted step it
    does not: layers are outermost, and of the last two axes that one is innermost whose
    size is a multiple of 128.

    Args:
      tree: parameters or state, arrays or ShapeDtypeStructs.
      shardings: a tree like it (a prefix will do) of shardings.

    Returns:
      A tree like ``tree`` for ``in_shardings`` and ``out_shardings`` of ``jax.jit``, of
      ``Format`` where there are three or more axes and of shardings elsewhere.

    Examples:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      >>> found = lro.layerwise.formats({"up": jnp.ones((3, 128, 341))}, one)
      >>> found["up"].layout.major_to_minor
      (0, 2, 1)
    """

    def place(sharding: Any, leaf: Any) -> Any:
        if leaf.ndim < 3:
            return sharding
        *outer, last = range(leaf.ndim)
        swap = leaf.shape[-1] % 128 and leaf.shape[-2] % 128 == 0
        order = (*outer[:-1], last, outer[-1]) if swap else (*outer, last)
        return Format(Layout(order), sharding)

    def below(sharding: Any, part: Any) -> Any:
        return jax.tree.map(functools.partial(place, sharding), part)

    known = lambda node: isinstance(node, jax.sharding.Sharding)  # noqa: E731
    return jax.tree.map(below, shardings, tree, is_leaf=known)


def _whole(fn: Callable, p: Any, x: Any, batch: Any, cotangent: Any) -> Any:
    """Returns ``fn``'s result, the gradient of p, and that of x."""
    out, back = jax.vjp(lambda p, x: fn(p, x, batch), p, x)
    return out, *back(cotangent)


def _summed(fn: Callable, p: Any, x: Any, batch: Any, cotangent: Any) -> Any:
    """The same for one micro-batch after another; gradients of p are summed."""

    def add(total: Any, one: Any) -> tuple[Any, Any]:
        out, grad, cotangent = _whole(fn, p, *one)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grad)
        return total, (out, cotangent)

    zeros = jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=wider(p.dtype, jnp.float32)), p
    )
    total, (out, cotangent) = jax.lax.scan(add, zeros, (x, batch, cotangent))
    grad = jax.tree.map(lambda t, p: t.astype(p.dtype), total, p)
    return out, grad, cotangent


def _check_micro_batches(batch: Any, count: int | None) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if count is not None and leaf.shape[:1] != (count,):
            raise ValueError(
                f"Every array of the batch must have micro_batches={count} as its "
                f"first axis; batch{jax.tree_util.keystr(path)} has the shape "
                f"{leaf.shape}."
            )


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
    )


def _slice(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i), tree)


def _put(tree: Any, one: Any, i: Array) -> Any:
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), i, 0),
        tree,
        one,
    )
