"""``zeroth_order``: gradient estimates from losses alone."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax._meshes import explicit_like, vary_like
from lowrank_optax.zeroth_order.directions import Directions, mezo
from lowrank_optax.zeroth_order.noise import fold_in
from lowrank_optax.zeroth_order.perturbed import moved
from lowrank_optax.zeroth_order.tree import Tree

# What the run's seed is folded with: 0 for subspaces, from 1 on for samples.
_EPOCH, _SAMPLE = 0, 1


class ZerothOrderState(NamedTuple):
    """State of a gradient estimate.

    Attributes:
      count: steps so far.
      key: the run's seed, ``uint32[2]``. All directions follow from it, from ``count``
        and from the leaves' paths.
      kept: a tree like the parameters of what the method keeps of every matrix, a
        tuple of arrays; ``MaskedNode`` for leaves of which it keeps nothing.
    """

    count: Array
    key: Array
    kept: Any


class _Probe(NamedTuple):
    """What two losses along every sample's direction have shown."""

    loss: Array
    projected: Array  # one per sample, 0 where a loss was not finite
    finite: Array
    seeds: list[Array]  # of every leaf, one per sample
    epochs: list[Array]


@dataclasses.dataclass(frozen=True, eq=False)
class ZerothOrder:
    """A loss with its gradient estimate, made by ``lro.zeroth_order``.

    Attributes:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a scalar.
      method: draws the directions.
      eps: length of the step to either side.
      samples: directions per step.
      clip: largest projected gradient, or None.
      trainable: leaves that move.
      scanned: leaves that are perturbed where the model's scan uses them.
      axis_name: mapped axes over which losses are averaged.
    """

    loss_fn: Callable[..., Any]
    method: Directions
    eps: Any
    samples: int
    clip: Any
    trainable: Any
    scanned: Any
    axis_name: Any

    def init(self, params: Any, key: Any) -> ZerothOrderState:
        """Returns the state before the first step.

        Args:
          params: parameters, arrays, Flax-boxed or not.
          key: a PRNG key of any kind; the state keeps 64 bits drawn from it.

        Raises:
          TypeError: if the key is none, or a leaf is complex or quantized.
          ValueError: if a choice of leaves matches nothing.
        """
        tree = self._tree(params)
        seed = _seed_of(key)
        count = jnp.zeros([], jnp.int32)
        kept = tree.keep(self._epoch(seed, count))
        return ZerothOrderState(*tree.placed(count, seed, kept))

    def value_and_grad(
        self, params: Any, state: ZerothOrderState, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Array, Any], ZerothOrderState]:
        """Returns what ``jax.value_and_grad(loss_fn)`` does, and the next state.

        Args:
          params: parameters.
          state: of the step before, or from ``init``.
          *args: passed on to the loss.
          **kwargs: passed on to the loss.

        Returns:
          ``((loss, grads), state)``: the mean of all losses, and an estimate like the
          parameters, in their dtypes, zero for leaves that do not move.

        Raises:
          TypeError: if the loss is no scalar of at least 32 bits.
        """
        tree = self._tree(params)
        state = self._renewed(tree, state)
        probe = self._probe(tree, state, args, kwargs)

        def estimate(i: Any) -> list[Any]:
            weight = probe.projected[i] / self.samples
            noises = tree.noises(_at(probe.seeds, i), probe.epochs, state.kept)
            return [
                noise if noise is None else explicit_like(array, _times, noise, weight)
                for array, noise in zip(tree.arrays, noises, strict=True)
            ]

        def add(i: Array, total: list[Any]) -> list[Any]:
            return jax.tree.map(jnp.add, total, estimate(i))

        total = estimate(0)
        if self.samples > 1:
            total = jax.lax.fori_loop(1, self.samples, add, total)
        grads = [
            jnp.zeros_like(array) if one is None else _cast(one, array.dtype)
            for array, one in zip(tree.arrays, total, strict=True)
        ]
        return (probe.loss, tree.boxed(grads)), _next(state)

    def step(
        self,
        params: Any,
        state: ZerothOrderState,
        *args: Any,
        learning_rate: Any,
        **kwargs: Any,
    ) -> tuple[Any, ZerothOrderState, dict[str, Array]]:
        """Moves the parameters, in place where the caller donates them.

        ``W <- W - learning_rate * mean_i k_i Z_i``, with the directions drawn again. No
        estimate is formed. Sums are made in float32; 16-bit parameters are rounded at
        random, so that steps below their precision count on average.

        Args:
          params: parameters; jit with ``donate_argnums=(0, 1)``.
          state: of the step before, or from ``init``.
          *args: passed on to the loss.
          learning_rate: a number, an array, or a schedule of ``state.count``.
          **kwargs: passed on to the loss.

        Returns:
          ``(params, state, metrics)`` with metrics ``loss``, the mean of all losses,
          ``projected_gradient``, the mean of ``k_i``, and ``skipped``, whether every
          sample had a loss that is not finite, so that nothing moves.

        Raises:
          TypeError: if the loss is no scalar of at least 32 bits.
        """
        tree = self._tree(params)
        state = self._renewed(tree, state)
        probe = self._probe(tree, state, args, kwargs)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        amounts = -jnp.asarray(rate, jnp.float32) * probe.projected / self.samples
        # A learning rate may be infinite or NaN, too, where nothing is to move.
        amounts = jnp.where(probe.finite, amounts, 0.0)

        def apply(i: Any, arrays: list[Array]) -> list[Array]:
            noises = tree.noises(_at(probe.seeds, i), probe.epochs, state.kept)
            rounding = (*state.key, state.count, i)
            return [
                array
                if noise is None
                else moved(array, noise, amounts[i], (*rounding, number))
                for array, noise, number in zip(
                    arrays, noises, tree.numbers, strict=True
                )
            ]

        arrays = tree.arrays
        if self.samples == 1:
            arrays = apply(0, arrays)
        else:
            # From one sample to the next: their sum would be one more copy.
            arrays = vary_like(arrays, amounts)
            arrays = jax.lax.fori_loop(0, self.samples, apply, arrays)
        metrics = {
            "loss": probe.loss,
            "projected_gradient": jnp.mean(probe.projected),
            "skipped": ~jnp.any(probe.finite),
        }
        return tree.boxed(arrays), _next(state), metrics

    def _tree(self, params: Any) -> Tree:
        return Tree(params, self.method, self.trainable, self.scanned)

    def _epoch(self, seed: Array, count: Array) -> Array:
        gap = self.method.gap
        return fold_in(seed, _EPOCH, 0 if gap is None else count // gap)

    def _renewed(self, tree: Tree, state: ZerothOrderState) -> ZerothOrderState:
        """Returns the state with what is kept for this step."""
        tree.check(state)
        gap = self.method.gap
        if gap is None or not jax.tree.leaves(state.kept):
            return state
        due = (state.count % gap == 0) & (state.count > 0)
        kept = jax.lax.cond(
            due,
            lambda kept: vary_like(
                explicit_like(kept, tree.keep, self._epoch(state.key, state.count)),
                *jax.tree.leaves(kept),
            ),
            lambda kept: kept,
            state.kept,
        )
        return state._replace(kept=kept)

    def _probe(
        self, tree: Tree, state: ZerothOrderState, args: Any, kwargs: Any
    ) -> _Probe:
        numbers = _SAMPLE + jnp.arange(self.samples, dtype=jnp.uint32)
        seeds = jax.vmap(tree.seeds)(fold_in(state.key, numbers, state.count))
        epochs = tree.seeds(self._epoch(state.key, state.count))
        eps = jnp.asarray(self.eps, jnp.float32)

        def loss(side: tuple[list[Array], Array]) -> Array:
            seeds, sign = side
            noises = tree.noises(seeds, epochs, state.kept)
            near = tree.perturbed(noises, sign * eps)
            return _checked(self.loss_fn(near, *args, **kwargs))

        # One side after the other, so that one copy at most is perturbed at a time and
        # the loss is traced once. Each has its seeds given: what does not change from
        # turn to turn a compiler may draw before the loop, and keep.
        signs = jnp.tile(jnp.asarray([1.0, -1.0], jnp.float32), self.samples)
        twice = [jnp.repeat(seed, 2, axis=0) for seed in seeds]
        losses = jax.lax.map(loss, (twice, signs))
        if self.axis_name is not None:
            losses = jax.lax.pmean(losses, self.axis_name)
        ahead, behind = losses[0::2], losses[1::2]
        projected = ((ahead - behind) / (2 * eps).astype(losses.dtype)).astype(
            jnp.float32
        )
        finite = jnp.isfinite(projected)
        projected = jnp.where(finite, projected, 0.0)
        if self.clip is not None:
            projected = jnp.clip(projected, -self.clip, self.clip)
        return _Probe(jnp.mean(losses), projected, finite, seeds, epochs)


def zeroth_order(
    loss_fn: Callable[..., Any],
    method: Directions | None = None,
    *,
    eps: Any = 1e-3,
    samples: int = 1,
    clip: Any = None,
    trainable: Any = None,
    scanned: Any = None,
    axis_name: Any = None,
) -> ZerothOrder:
    """Estimates the gradient of a loss from its values, without a backward pass.

    For random directions ``Z_i`` over all parameters together::

        k_i = (loss(W + eps Z_i) - loss(W - eps Z_i)) / (2 eps)
        g   = 1/n sum_i k_i Z_i

    which is the gradient on average, up to terms of order ``eps^2``. The directions are
    functions of a seed, the step and the leaves' paths: they are drawn again wherever
    they are needed, and the same on every mesh.

    ``value_and_grad`` returns g, for any Optax transformation. ``step`` moves the
    parameters without forming g and takes the memory of inference, if ``scanned``
    names the stacks of layers that the model scans over and the model calls
    ``lro.materialize`` on each layer.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a scalar in float32 or float64,
        which is not differentiated. It must be the same function both times: dropout
        off, one batch. Where a batch is cut into micro-batches, their mean is taken
        inside.
      method: how directions are drawn: ``lro.mezo()`` (None), ``lro.subzero()``,
        ``lro.tezo()`` or ``lro.lozo()``.
      eps: 1e-3, as in MeZO, for weights of a standard deviation of 0.02 to 0.2. Less
        drowns in rounding, more in curvature. May be traced.
      samples: n; the noise falls and the cost grows with it. 1, as in MeZO.
      clip: the largest ``|k_i|``, which has heavy tails; None for none. May be traced.
      trainable: which leaves move, all real floating-point ones (None), or as
        ``select`` of ``lro.project``: a regular expression, a list of words, a callable
        ``(path, leaf) -> bool``, or a tree of flags. All others are given to the loss
        as they are.
      scanned: leaves, likewise, that stay unperturbed until ``lro.materialize`` is
        called on a slice of them along their first axis; None for none.
      axis_name: inside ``jax.shard_map`` or ``jax.pmap``: the axes over which the
        losses are averaged. Parameters, state and so directions must be the same on
        all devices of them; two scalars are all that is sent.

    Returns:
      An object with ``init(params, key)``, ``value_and_grad(params, state, *args)`` and
      ``step(params, state, *args, learning_rate=...)``. A sample of which a loss is not
      finite counts as zero, whatever the rest.

    Raises:
      TypeError: if ``loss_fn`` is no function, ``method`` no method or ``samples`` no
        int.
      ValueError: if a number is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}
      >>> def loss_fn(params, x):
      ...     return jnp.mean((x @ params["kernel"] + params["bias"]) ** 2)
      >>> zo, tx = lro.zeroth_order(loss_fn, lro.subzero(rank=4)), optax.adam(1e-2)
      >>> state, opt_state = zo.init(params, jax.random.key(0)), tx.init(params)
      >>> @jax.jit
      ... def step(params, state, opt_state, x):
      ...     (loss, grads), state = zo.value_and_grad(params, state, x)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return optax.apply_updates(params, updates), state, opt_state, loss
      >>> params, state, opt_state, loss = step(
      ...     params, state, opt_state, jnp.ones((4, 16))
      ... )
      >>> int(state.count), round(float(loss))
      (1, 256)

      In place:

      >>> step = jax.jit(zo.step, donate_argnums=(0, 1))
      >>> params, state, metrics = step(
      ...     params, state, jnp.ones((4, 16)), learning_rate=1e-5
      ... )
      >>> sorted(metrics)
      ['loss', 'projected_gradient', 'skipped']

    References:
      Spall, Multivariate Stochastic Approximation Using a Simultaneous Perturbation
      Gradient Approximation (1992).
      Malladi et al., Fine-Tuning Language Models with Just Forward Passes (2023),
      https://arxiv.org/abs/2305.17333
    """
    method = mezo() if method is None else method
    if not callable(loss_fn):
        raise TypeError(
            "lro.zeroth_order: `loss_fn` must be a function (params, *args) -> loss, "
            f"got {type(loss_fn).__name__}."
        )
    if not isinstance(method, Directions):
        raise TypeError(
            "lro.zeroth_order: `method` must be one of lro.mezo(), lro.subzero(), "
            f"lro.tezo() and lro.lozo(), or another lro.Directions; got {method!r}."
        )
    _checks.positive_int("samples", samples)
    _check_positive("eps", eps)
    if clip is not None:
        _check_positive("clip", clip)
    return ZerothOrder(
        loss_fn, method, eps, samples, clip, trainable, scanned, axis_name
    )


def _check_positive(name: str, value: Any) -> None:
    # An array may be traced, and then has no value to look at.
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number and not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"lro.zeroth_order: `{name}` must be a number, got {value!r} of type "
            f"{type(value).__name__}."
        )
    if number and not 0 < float(value) < float("inf"):
        raise ValueError(
            f"lro.zeroth_order: `{name}` must be positive and finite, got {value}."
        )


def _checked(loss: Any) -> Array:
    """Returns a loss if two of them can be told apart."""
    if not jax.tree_util.all_leaves([loss]) or getattr(loss, "shape", ()) != ():
        raise TypeError(
            "lro.zeroth_order: loss_fn must return a scalar, without auxiliary values; "
            f"got {jax.tree.map(jnp.shape, loss)}."
        )
    dtype = getattr(loss, "dtype", None)
    if dtype is None or dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            "lro.zeroth_order: loss_fn must return float32 or float64, got "
            f"{dtype or type(loss).__name__}. Two losses differ by 2 eps |k|, which 16 "
            "bits do not resolve: compute logits and the mean over them in float32."
        )
    return loss


def _at(arrays: list[Array], i: Any) -> list[Array]:
    return [array[i] for array in arrays]


def _cast(x: Array, dtype: Any) -> Array:
    """Returns numbers in another dtype, the largest ones where it has no larger."""
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max))
    return jnp.clip(x, -largest, largest).astype(dtype)


def _times(noise: Any, weight: Array) -> Array:
    return noise.dense() * weight


def _next(state: ZerothOrderState) -> ZerothOrderState:
    return state._replace(count=optax.safe_increment(state.count))


def _seed_of(key: Any) -> Array:
    """Returns 64 bits of a key of any kind, so that the state does not hang on it."""
    try:
        return jax.random.bits(key, (2,), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "lro.zeroth_order: init wants a PRNG key, such as jax.random.key(0), got "
            f"{key!r} of type {type(key).__name__}."
        ) from error
