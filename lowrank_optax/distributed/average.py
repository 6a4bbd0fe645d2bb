"""Gradients summed where they are small: data parallelism and accumulation.

Between refreshes a bracket sees a gradient G only through ``R = P^T G``, with a basis P
that all devices share. A mean is linear, ``mean_i P^T G_i = P^T mean_i G_i``, so R can
be averaged in place of G: ``r n`` numbers instead of ``m n``. The optimizer is then
given ``G' = P (P^T P)^-1 R``, for which ``P^T G' = R``: the same step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax._meshes import explicit_like, explicit_mesh
from lowrank_optax.distributed.compression import Channel, Compression, LeafTraffic
from lowrank_optax.distributed.mapped import check_averaging, varying
from lowrank_optax.leaves.boxes import is_box, refill, unbox
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.linalg.products import wide, wider
from lowrank_optax.shapes.report import aligned


@dataclasses.dataclass(frozen=True)
class TrafficReport:
    """What is sent of every gradient, printable.

    Attributes:
      rows: one ``LeafTraffic`` per parameter, in their order.
    """

    rows: tuple[LeafTraffic, ...]

    @property
    def compressed(self) -> tuple[str, ...]:
        """Paths of the leaves of which a projection is sent between refreshes."""
        return tuple(row.path for row in self.rows if row.compressed)

    @property
    def whole(self) -> tuple[str, ...]:
        """Paths of the leaves that are sent whole at every step."""
        return tuple(row.path for row in self.rows if not row.compressed)

    @property
    def numbers(self) -> tuple[int, int]:
        """How many numbers are sent plainly, and between refreshes."""
        return sum(row.whole for row in self.rows), sum(row.sent for row in self.rows)

    def __str__(self) -> str:
        """Returns the table."""
        table = [("leaf", "shape", "whole", "sent", "why")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            cells = (row.path, shape, f"{row.whole:,}", f"{row.sent:,}", row.reason)
            table.append(cells)
        whole, sent = self.numbers
        last = f"{sent:,} numbers between refreshes, {whole:,} plainly"
        return "\n".join([*aligned(table), last])


def traffic_report(tx: optax.GradientTransformation, params: Any) -> TrafficReport:
    """Reports which gradients can be sent as projections, and why others cannot.

    A leaf is sent whole if no bracket projects it, and if the method reads its whole
    gradient at every step: a recovery (Fira, SubTrack++, APOLLO, FRUGAL, the details of
    GWT, error feedback), a basis that moves at every step (Online Subspace Descent,
    LDAdam), or a refresh at every step.

    Args:
      tx: an optimizer with at least one bracket inside, in any nesting.
      params: parameters, or ShapeDtypeStructs of them; nothing is allocated.

    Returns:
      The report; print it.

    Raises:
      ValueError: if there is no bracket in ``tx``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> lro.distributed.traffic_report(lro.galore(1e-3, rank=4), params).numbers
      (2080, 288)
      >>> lro.distributed.traffic_report(lro.fira(1e-3, rank=4), params).whole
      ('bias', 'kernel')
    """
    return TrafficReport(tuple(Compression(tx, params).rows.values()))


def refresh_due(tx: optax.GradientTransformation, state: Any, params: Any) -> Array:
    """Returns whether the step from this state needs any compressed gradient whole.

    It does where a basis is due for a refresh, is owed one (at the start, or after a
    gradient that was zero or not finite), or has lost its rank.

    Args:
      tx: an optimizer with at least one bracket inside.
      state: its state.
      params: the parameters.

    Returns:
      A boolean scalar, False if no leaf is compressed.

    Raises:
      ValueError: if there is no bracket in ``tx``, or the state is another one's.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.galore(1e-3, rank=4, update_proj_gap=10)
      >>> state = tx.init(params)
      >>> _, later = tx.update(params, state, params)
      >>> [bool(lro.distributed.refresh_due(tx, s, params)) for s in (state, later)]
      [True, False]
    """
    return _any_whole(Compression(tx, params).channels(state))


def pmean(
    gradients: Any,
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    axis_name: Any,
    *,
    refresh: bool | None = None,
) -> Any:
    r"""``jax.lax.pmean`` of gradients for ``tx``, smaller between refreshes.

    For every leaf that ``traffic_report`` calls compressed, with the basis P that the
    state holds::

        R = mean_devices P^T G       [r, n] in place of [m, n]
        G' = P (P^T P)^-1 R          P^T G' = P^T mean G

    and the mean of G itself for the matrices that are due for a refresh in this step;
    for all other leaves the mean. ``tx.update`` of the result is the step of the plain
    mean, up to rounding. Projections travel in the gradient's dtype.

    What stands in front of the bracket inside ``tx`` sees G': a global norm to clip by
    is that of the part of the mean gradient in the subspace and of the whole leaves,
    which is what was sent. Transformations with a memory of their own do not belong
    there: their memory of G' is of another basis after a refresh.

    Args:
      gradients: one device's own gradients, not yet averaged. Under ``jax.shard_map``
        the parameters need ``jax.lax.pcast(params, axis, to="varying")`` before
        ``jax.grad``, which would sum over the devices otherwise; ``value_and_grad``
        does all of this.
      tx: an optimizer with at least one bracket inside.
      state: its state, the same on all devices.
      params: the parameters, the same on all devices.
      axis_name: the mapped axis (or axes) of ``jax.shard_map`` or ``jax.pmap``.
      refresh: None asks the state at every step; False leaves the other branch out of
        the program, for steps where ``refresh_due`` is False; True is the plain mean.

    Returns:
      A tree like ``gradients``, the same on all devices; compressed leaves are float32
      or wider, so that nothing is rounded.

    Raises:
      ValueError: if the axis is unknown, the gradients are averaged already, there is
        no bracket in ``tx``, or the state is another one's.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> tx = lro.galore(1e-3, rank=2)
      >>> def mean(gradients):
      ...     state = tx.init(params)
      ...     return lro.distributed.pmean(gradients, tx, state, params, "data")
      >>> one = jax.tree.map(lambda x: x[None], params)
      >>> jax.pmap(mean, axis_name="data")(one)["kernel"].shape
      (1, 8, 4)
    """
    check_averaging(gradients, axis_name)
    compression = Compression(tx, params)

    def average(gradients: Any, state: Any) -> Any:
        channels = compression.channels(state)
        if refresh:
            return _widened(channels, mean(gradients))
        sent = mean(_down(channels, gradients))
        if refresh is False:
            return _up(channels, gradients, sent)

        def finish(channel: Channel, gradient: Array, low: Array) -> Array:
            return channel.either(low, mean, gradient)

        return _map(channels, finish, gradients, sent)

    def mean(tree: Any) -> Any:
        return jax.lax.pmean(tree, axis_name)

    return explicit_like(gradients, average, gradients, state)


def value_and_grad(
    loss: Callable[[Any, Any], Array],
    tx: optax.GradientTransformation,
    *,
    axis_name: Any = None,
    micro_batches: int = 1,
    refresh: bool | None = None,
) -> Callable[[Any, Any, Any], tuple[Array, Any]]:
    r"""Value and gradient of a mean loss, summed in the subspaces of ``tx``.

    Over K micro-batches and over devices, between refreshes::

        R = mean_devices 1/K sum_k P^T G_k      [r, n], accumulator and all-reduce
        G' = P (P^T P)^-1 R

    and the mean of G itself in steps that refresh a basis. See ``pmean`` for what that
    means for clipping. With one micro-batch, matrices that are due are sent whole one
    by one; with more, a step in which any of them is due accumulates all of them whole,
    so ``stagger`` and accumulation together save nothing.

    Args:
      loss: ``(params, batch) -> scalar``, a mean over the batch.
      tx: an optimizer with at least one bracket inside.
      axis_name: the mapped axis (or axes) of ``jax.shard_map`` or ``jax.pmap`` that the
        batch is spread over; None on one device, or where ``jax.jit`` spreads it.
      micro_batches: K, into which the leading axis of every batch leaf is cut.
      refresh: None asks the state at every step, with both kinds of step in one
        program; its memory is that of the larger. True and False are one kind each, for
        a caller who asks ``refresh_due``: see "Accumulation" in the guide.

    Returns:
      ``(params, state, batch) -> (value, gradients)``, the same on all devices, for
      ``tx.update(gradients, state, params)``.

    Raises:
      TypeError: if ``micro_batches`` is not an int.
      ValueError: if it is below 1; when called, if the batch cannot be cut, the axis is
        unknown, a parameter is itself spread over it, or ``tx`` has no bracket.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> params, tx = {"kernel": jnp.ones((8, 4))}, lro.galore(1e-3, rank=2)
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["kernel"]) ** 2)
      >>> gradient = lro.distributed.value_and_grad(loss, tx, micro_batches=2)
      >>> @jax.jit
      ... def step(params, state, batch):
      ...     value, gradients = gradient(params, state, batch)
      ...     updates, state = tx.update(gradients, state, params)
      ...     return optax.apply_updates(params, updates), state, value
      >>> float(step(params, tx.init(params), jnp.ones((4, 8)))[2])
      64.0
    """
    micro_batches = _checks.positive_int("micro_batches", micro_batches)

    gradient = jax.value_and_grad(loss)

    def mean(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def run(params: Any, state: Any, batch: Any) -> tuple[Array, Any]:
        # Else `jax.grad` would sum over the devices itself, at full size.
        own = params if axis_name is None else varying(params, axis_name)
        if micro_batches == 1:
            value, grads = gradient(own, batch)
            if axis_name is not None:
                grads = pmean(grads, tx, state, params, axis_name, refresh=refresh)
            return mean(value), grads
        micro = _cut(batch, micro_batches)
        _refuse_explicit_axes(params)
        channels = Compression(tx, params).channels(state)

        def total(form: Callable[[Any], Any]) -> tuple[Array, Any]:
            def part(micro: Any) -> tuple[Array, Any]:
                value, grads = gradient(own, micro)
                return value, form(grads)

            # Summed on each device first: one all-reduce a step, not one a micro-batch.
            return mean(_mean_of_parts(part, micro, axis_name))

        def narrow() -> tuple[Array, Any]:
            value, low = total(lambda grads: _down(channels, grads))
            return value, _up(channels, params, low)

        def whole() -> tuple[Array, Any]:
            value, grads = total(lambda grads: grads)
            return value, _widened(channels, grads)

        # The branch stands around the whole accumulation, since the accumulators of the
        # two kinds of step have different shapes.
        if refresh is None:
            return jax.lax.cond(_any_whole(channels), whole, narrow)
        return whole() if refresh else narrow()

    return run


def _mean_of_parts(part: Callable[[Any], Any], parts: Any, axis_name: Any) -> Any:
    """Returns the mean of ``part`` over the leading axis, summed in float32."""
    like = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, wider(jnp.float32, x.dtype)), like
    )
    if axis_name is not None:
        # The carry of a scan keeps its type, and sums differ from device to device.
        zeros = varying(zeros, axis_name)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(
            lambda t, x: t + x.astype(t.dtype), total, part(micro)
        ), None

    total, _ = jax.lax.scan(add, zeros, parts)
    count = len(jax.tree.leaves(parts)[0])
    return jax.tree.map(lambda t, x: (t / count).astype(x.dtype), total, like)


def _any_whole(channels: dict[str, Channel]) -> Array:
    flags = [jnp.any(c.whole) for c in channels.values() if c.whole is not None]
    return jnp.any(jnp.stack(flags)) if flags else jnp.bool_(False)


def _map(channels: dict[str, Channel], fn: Callable, tree: Any, *rest: Any) -> Any:
    """Applies ``fn(channel, leaf, *leaves)`` to the compressed leaves.

    Of the others the last tree's stay.
    """

    def each(path: Any, box: Any, *boxes: Any) -> Any:
        channel = channels.get(path_string(path))
        if channel is None:
            return (box, *boxes)[-1]
        return refill(box, fn(channel, unbox(box), *map(unbox, boxes)))

    return jax.tree_util.tree_map_with_path(each, tree, *rest, is_leaf=is_box)


def _down(channels: dict[str, Channel], gradients: Any) -> Any:
    def each(path: Any, box: Any) -> Any:
        channel = channels.get(path_string(path))
        # A projection is no array for the box of its gradient.
        return box if channel is None else channel.down(unbox(box))

    return jax.tree_util.tree_map_with_path(each, gradients, is_leaf=is_box)


def _up(channels: dict[str, Channel], like: Any, low: Any) -> Any:
    return _map(channels, lambda channel, _, x: channel.up(x), like, low)


def _widened(channels: dict[str, Channel], gradients: Any) -> Any:
    # The branches of a `lax.cond` must return equal types, and G' is wide.
    return _map(channels, lambda _, x: wide(x), gradients)


def _cut(batch: Any, parts: int) -> Any:
    def cut(path: Any, x: Any) -> Array:
        if x.ndim == 0 or x.shape[0] % parts:
            raise ValueError(
                f"micro_batches={parts} must divide the leading axis of every batch "
                f"leaf on a device; leaf {path_string(path) or 'batch'!r} has shape "
                f"{x.shape} there."
            )
        return x.reshape((parts, x.shape[0] // parts, *x.shape[1:]))

    return jax.tree_util.tree_map_with_path(cut, batch)


def _refuse_explicit_axes(params: Any) -> None:
    mesh = explicit_mesh(params)
    if mesh is not None:
        raise ValueError(
            "Accumulation (micro_batches > 1) needs automatic axes wherever parameters "
            f"may be sharded; the mesh has the explicit axes {mesh.explicit_axes}. "
            "Make it with axis_types=AxisType.Auto, or accumulate inside jax.shard_map "
            "over all axes."
        )
