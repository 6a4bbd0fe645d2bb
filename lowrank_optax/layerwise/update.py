"""The update of a part of a model whose layers are stacked: which state is whose."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.transforms import MaskedNode

from lowrank_optax.layerwise.dependence import (
    MIXED,
    NOTHING,
    RANDOM,
    Dependence,
    dependences,
)
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.leaves.slices import at_layer


class LayerUpdate:
    """``tx.update`` of some parts of the tree, with the rest masked.

    The state of a part is what ``tx.init`` makes of the tree with the rest masked; its
    leaves stand at the same paths in the state of the whole, a dict by path here.
    """

    def __init__(
        self, tx: Any, params: Any, state: Any, layers: int, names: tuple[str, ...]
    ):
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
        _check_state(state, whole)
        self._refuse_coupling(state, layers)

    def _shapes(self, part: tuple[str, ...], params: Any) -> Any:
        return jax.eval_shape(self.tx.init, self._masked(part, params))

    def _masked(self, part: tuple[str, ...], tree: Any) -> Any:
        return like_params(
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
        # The layers' alone, and one for all of them, such as a counter per leaf.
        self.single = self.common & set(one) - inside[names] - inside["embed",]
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

    def __call__(self, part, grads, params, state, *, gain, keep, own_norm) -> Any:
        """Returns new parameters, own leaves and shared leaves of the part."""
        leaves = state if part == ("layers",) else _by_path(state)
        shapes = self.parts[part]
        before = jax.tree.unflatten(
            jax.tree.structure(shapes), [leaves[path] for path in _by_path(shapes)]
        )
        if own_norm is not None:
            gain = gain_of(jnp.sqrt(squares(grads)), own_norm)
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


def _check_state(state: Any, expected: Any) -> None:
    found, wanted = (
        {path: (leaf.shape, leaf.dtype) for path, leaf in _by_path(tree).items()}
        for tree in (state, expected)
    )
    for path in sorted({*found, *wanted}):
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"The state is not one of tx for these params: at {path!r} tx.init has "
                f"{wanted.get(path)}, the state {found.get(path)}."
            )


def count_layers(params: Any, names: tuple[str, ...]) -> int:
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


def like_params(params: Any, parts: dict[str, Any]) -> Any:
    return type(params)({name: parts[name] for name in params})


def _one(x: Any) -> Any:
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)


def _two(x: Any) -> Any:
    return jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)


def gain_of(norm: Array, largest: Any) -> Array:
    return jnp.where(norm < largest, 1.0, largest / norm)


def squares(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    return sum(
        (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves), jnp.float32(0)
    )
