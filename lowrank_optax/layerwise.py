"""Backward pass and update of one layer at a time: one layer's gradient is alive.

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
from jaxtyping import Array
from optax.transforms import MaskedNode

from lowrank_optax._dependence import (
    MIXED,
    NOTHING,
    RANDOM,
    Dependence,
    dependences,
)
from lowrank_optax._matrices import path_string
from lowrank_optax._slices import at_layer

Step = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, Array]]]


def train_step(
    embed: Callable[[Any, Any], Any],
    block: Callable[[Any, Any], Any],
    head: Callable[[Any, Any, Any], Array],
    tx: optax.GradientTransformation,
    *,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    head_names: tuple[str, ...] | None = None,
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
        Low-rank methods need ``layer_axis=0``.
      clip_norm: largest global norm of the gradient. It is measured exactly, in a
        backward pass of its own.
      skip_nonfinite: leave everything as it was when the gradient's norm is not
        finite; costs the same backward pass.
      head_names: names of the head's parts in ``params`` where there is no ``"head"``;
        ``head`` is given a dict of them.

    Returns:
      ``step(params, state, batch) -> (params, state, metrics)`` with state as in
      ``tx.init(params)`` and metrics ``loss``, ``grad_norm`` (before clipping) and
      ``skipped``. Jit it with ``donate_argnums=(0, 1)``.

    Raises:
      ValueError: when ``step`` is traced, if ``params`` has other parts, layers
        disagree in their number, or ``tx`` mixes the parts or cannot be cut into
        layers.

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
    names = ("head",) if head_names is None else tuple(head_names)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, dict[str, Array]]:
        layers = _count_layers(params, names)
        update = _Update(tx, params, layers, names)
        head_params = {name: params[name] for name in names}

        def last(part: Any, x: Any) -> Array:
            return head(part if head_names is not None else part["head"], x, batch)

        first, embed_vjp = jax.vjp(lambda e: embed(e, batch), params["embed"])
        x, inputs = jax.lax.scan(lambda x, p: (block(p, x), x), first, params["layers"])
        loss, head_vjp = jax.vjp(last, head_params, x)
        head_grad, cotangent = head_vjp(jnp.ones_like(loss))

        def backward(stack: Any, i: Array, cotangent: Any) -> tuple[Any, Any]:
            p, x = _at(stack, i), _at(inputs, i)
            return jax.vjp(block, p, x)[1](cotangent)

        norm, gain = None, None
        if clip_norm is not None or skip_nonfinite:

            def measure(at: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
                cotangent, total = carry
                grad, cotangent = backward(params["layers"], layers - 1 - at, cotangent)
                return cotangent, total + _squares(grad)

            bottom, total = jax.lax.fori_loop(
                0, layers, measure, (cotangent, _squares(head_grad))
            )
            norm = jnp.sqrt(total + _squares(embed_vjp(bottom)[0]))
            if clip_norm is not None:
                gain = jnp.where(norm < clip_norm, 1.0, clip_norm / norm)
        keep = ~jnp.isfinite(norm) if norm is not None and skip_nonfinite else None
        apply = functools.partial(update, gain=gain, keep=keep)

        old = update.shared(state)
        new_head, head_state, new_shared = apply(names, head_grad, head_params, state)

        def descend(at: Array, carry: Any) -> Any:
            stack, own, cotangent, total = carry
            i = layers - 1 - at
            grad, cotangent = backward(stack, i, cotangent)
            total = total + _squares(grad)
            p, s = _slice(stack, i), _slice(own, i)
            grad = jax.tree.map(lambda g: g[None], grad)
            with at_layer(i, layers):
                p, s, _ = apply(
                    ("layers",), {"layers": grad}, {"layers": p}, {**old, **s}
                )
            return _put(stack, p["layers"], i), _put(own, s, i), cotangent, total

        start = (
            params["layers"],
            update.own("layers", state),
            cotangent,
            _squares(head_grad),
        )
        stack, own, cotangent, total = jax.lax.fori_loop(0, layers, descend, start)
        (embed_grad,) = embed_vjp(cotangent)
        new_embed, embed_state, _ = apply(
            ("embed",), {"embed": embed_grad}, {"embed": params["embed"]}, state
        )
        if norm is None:
            norm = jnp.sqrt(total + _squares(embed_grad))
        parts = {**new_head, **new_embed, "layers": stack}
        leaves = {**new_shared, **head_state, **own, **embed_state}
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "skipped": jnp.bool_(False) if keep is None else keep,
        }
        return _like(params, parts), update.join(state, leaves), metrics

    return step


class _Update:
    """``tx.update`` of some parts of the tree, with the rest masked.

    The state of a part is what ``tx.init`` makes of the tree with the rest masked; its
    leaves stand at the same paths in the state of the whole, a dict by path here.
    """

    def __init__(self, tx: Any, params: Any, layers: int, names: tuple[str, ...]):
        self.tx, self.params = tx, params
        whole = jax.eval_shape(tx.init, params)
        self.parts = {
            part: self._shapes(part, params)
            for part in (names, ("embed",), ("layers",))
        }
        one = params | {"layers": jax.tree.map(_one, params["layers"])}
        two = params | {"layers": jax.tree.map(_two, params["layers"])}
        with at_layer(0, layers):
            self.parts["layers",] = self._shapes(("layers",), one)
        self._owners(_by_path(whole), layers, names, two)
        self._refuse_coupling(whole, layers)

    def _shapes(self, part: tuple[str, ...], params: Any) -> Any:
        return jax.eval_shape(self.tx.init, self._masked(part, params))

    def _masked(self, part: tuple[str, ...], tree: Any) -> Any:
        return _like(
            self.params,
            {k: tree[k] if k in part else MaskedNode() for k in self.params},
        )

    def _owners(self, whole, layers, names, two) -> None:
        """Finds whose every leaf of the state is, by path."""
        one = _by_path(self.parts["layers",])
        with at_layer(0, layers):
            other = _by_path(self._shapes(("layers",), two))
        if missing := sorted(set(one) ^ set(other)):
            raise ValueError(_DIFFERENT.format(path=missing[0]))
        stacked = {path for path in one if one[path].shape != other[path].shape}
        for path in sorted(one):
            expected = one[path].shape
            if path in stacked:
                expected = (layers, *expected[1:])
            found = whole[path].shape if path in whole else None
            if found != expected or (path in stacked and one[path].shape[0] != 1):
                raise ValueError(
                    f"State leaf {path!r} has shape {found} for {layers} layers and "
                    f"{one[path].shape} for one: it cannot be cut into layers along "
                    "its first axis. Use an optimizer that keeps layers apart; "
                    "low-rank methods need layer_axis=0."
                )
        self.owned = {"layers": stacked}
        rest = set(whole) - stacked
        inside = {part: set(_by_path(self.parts[part])) for part in (names, ("embed",))}
        common = inside[names] & inside["embed",]
        self.common = common | (set(one) - stacked)
        self.owned["head"] = inside[names] - self.common
        self.owned["embed"] = inside["embed",] - self.common
        known = self.common | self.owned["head"] | self.owned["embed"]
        if lost := sorted((rest - known) | (known - rest)):
            raise ValueError(_DIFFERENT.format(path=lost[0]))

    def _refuse_coupling(self, whole: Any, layers: int) -> None:
        """Raises unless every part, and every layer, is updated from itself alone."""
        closed = jax.make_jaxpr(lambda *args: self.tx.update(*args))(
            self.params, whole, self.params
        )
        owner = {path: part for part, paths in self.owned.items() for path in paths}
        parts = [
            key[0].key if key[0].key in ("embed", "layers") else "head"
            for key, _ in jax.tree_util.tree_leaves_with_path(self.params)
        ]
        kept = [owner.get(path) for path in _by_path(whole)]
        # Of the state only numbers count: flags and counters say when, not what.
        given = [
            part if jnp.issubdtype(leaf.dtype, jnp.floating) else None
            for part, leaf in zip(kept, jax.tree.leaves(whole), strict=True)
        ]
        inputs = [_source(part) for part in (*parts, *given, *parts)]
        what = [f"The update of params{path}" for path in _by_path(self.params)]
        what += [f"The new state at {path}" for path in _by_path(whole)]
        found = dependences(closed, inputs, layers)
        for name, part, one in zip(what, [*parts, *kept], found, strict=True):
            others = sorted(one.names - {part, RANDOM})
            source = f"the gradient of {', '.join(others)}" if others else ""
            if part == "layers" and layers > 1 and one.place == MIXED and not source:
                source = RANDOM if RANDOM in one.names else "several layers at once"
            if source:
                raise ValueError(_COUPLED.format(name=name, source=source))

    def shared(self, state: Any) -> dict[str, Any]:
        return self._pick(state, self.common)

    def own(self, part: str, state: Any) -> dict[str, Any]:
        return self._pick(state, self.owned[part])

    def _pick(self, state: Any, paths: set[str]) -> dict[str, Any]:
        return {k: v for k, v in _by_path(state).items() if k in paths}

    def join(self, state: Any, leaves: dict[str, Any]) -> Any:
        return jax.tree.unflatten(
            jax.tree.structure(state), [leaves[path] for path in _by_path(state)]
        )

    def __call__(self, part, grads, params, state, *, gain, keep) -> Any:
        """Returns new parameters, own leaves and shared leaves of the part."""
        leaves = state if part == ("layers",) else _by_path(state)
        shapes = self.parts[part]
        before = jax.tree.unflatten(
            jax.tree.structure(shapes), [leaves[path] for path in _by_path(shapes)]
        )
        if gain is not None:
            grads = jax.tree.map(lambda g: (g * gain).astype(g.dtype), grads)
        masked = self._masked(part, params)
        updates, after = self.tx.update(self._masked(part, grads), before, masked)
        updates = {name: updates[name] for name in part}
        new = optax.apply_updates(params, updates)
        if keep is not None:
            new, after = jax.tree.map(
                lambda a, b: jnp.where(keep, a, b), (params, before), (new, after)
            )
        after = _by_path(after)
        shared = {k: v for k, v in after.items() if k in self.common}
        return new, {k: v for k, v in after.items() if k not in shared}, shared


_COUPLED = (
    "{name} depends on {source}: tx couples leaves or layers (clipping by the global "
    "norm or by that of a leaf, a guard against non-finite values, trust ratios), and "
    "a layer-wise step never holds all gradients at once. Use clip_norm= and "
    "skip_nonfinite= of train_step, not of tx."
)
_DIFFERENT = (
    "State leaf {path!r} exists for a part of the parameters and not for the whole, or "
    "the other way round: tx chooses leaves by what it sees of the tree (a min_size "
    "between one layer and all of them, say). Choose them by name, with select=."
)


def _count_layers(params: Any, names: tuple[str, ...]) -> int:
    expected = {"embed", "layers", *names}
    if set(params) != expected:
        raise ValueError(
            f"params must have the parts {sorted(expected)}; got {sorted(params)}. "
            "Name the head's parts with head_names=."
        )
    counts = {
        path_string(path): leaf.shape[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])
    }
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            "Every leaf of params['layers'] must have the layers as its first axis; "
            f"got first axes {counts}."
        )
    return next(iter(counts.values()))[0]


def _source(part: str | None) -> Dependence:
    if part is None:
        return NOTHING
    return Dependence(frozenset([part]), (0, 1) if part == "layers" else None)


def _by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def _like(params: Any, parts: dict[str, Any]) -> Any:
    return type(params)({name: parts[name] for name in params})


def _one(x: Any) -> Any:
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)


def _two(x: Any) -> Any:
    return jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)


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


def _squares(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    return sum(
        (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves), jnp.float32(0)
    )
