"""``LayerUpdate``: the update of a part of a model, and which state is whose."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.transforms import MaskedNode

from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.layerwise.coupling import Coupling
from lowrank_optax.layerwise.stacks import (
    DIFFERENT,
    Stacks,
    by_path,
    like_params,
    parts_of,
    with_layers,
)
from lowrank_optax.leaves.layer import Layer
from lowrank_optax.leaves.matrix import path_string


class LayerUpdate:
    """``tx.update`` of some parts of the tree, with the rest masked.

    The state of a part is what ``tx.init`` makes of the tree with the rest masked; its
    leaves stand at the same paths in the state of the whole, a dict by path here.

    Attributes:
      layers: how many layers the stacks have.
      common: paths of the state that serves several parts, or all layers.
      single: those among them that the layers' part alone has, such as a counter for
        every leaf.
      owned: per part, the paths of the state that is its own.
      kind: structure and shapes of parameters and state.
    """

    def __init__(
        self, tx: Any, params: Any, state: Any, layers: int, names: tuple[str, ...]
    ):
        self.tx, self.params = optax.with_extra_args_support(tx), params
        self.names = tuple(parts_of(params))
        self.layers = layers
        self.whole = whole = jax.eval_shape(quiet_init(tx), params)
        self.stacks = Stacks(quiet_init(tx), self._masked(("layers",), params), layers)
        self.parts = {
            part: jax.eval_shape(quiet_init(tx), self._masked(part, params))
            for part in (names, ("embed",))
        }
        # The state of ONE layer, since every update of a stack sees one.
        self.parts["layers",] = self.stacks.one
        self._owners(by_path(whole), names)
        _check_state(state, whole)
        shapes = ((x.shape, x.dtype) for x in jax.tree.leaves((params, whole)))
        self.kind = jax.tree.structure((params, whole)), tuple(shapes)

    def _masked(self, part: tuple[str, ...], tree: Any) -> Any:
        parts = parts_of(tree)
        shown = {k: parts[k] if k in part else MaskedNode() for k in self.names}
        return like_params(self.params, shown)

    def _owners(self, whole: dict[str, Any], names: tuple[str, ...]) -> None:
        """Finds whose every leaf of the state is, by path.

        A leaf at the path of one part alone is its own; at the paths of several it
        serves them all, as a counter of steps does.
        """
        stacked, cut = set(self.stacks.whole), self.stacks.cut
        inside = {part: set(by_path(self.parts[part])) for part in (names, ("embed",))}
        self.common = (inside[names] & inside["embed",]) | (stacked - cut)
        self.single = stacked - cut - inside[names] - inside["embed",]
        self.owned = {
            "layers": cut,
            "head": inside[names] - self.common,
            "embed": inside["embed",] - self.common,
        }
        known = self.common.union(*self.owned.values())
        if lost := sorted(set(whole) ^ known):
            raise ValueError(DIFFERENT.format(path=lost[0]))
        for path in sorted(stacked):
            if whole[path].shape != self.stacks.whole[path].shape:
                raise ValueError(DIFFERENT.format(path=path))

    def refuse_coupling(self) -> None:
        """Raises unless every part, and every layer, is updated from itself alone."""
        self._check_one()
        owner = {path: part for part, paths in self.owned.items() for path in paths}
        masked = self._masked(("layers",), self.params)
        Coupling(self.tx, self.params, masked, self.whole, self.stacks, owner).refuse()

    def _check_one(self) -> None:
        """Raises unless one layer's update goes through, its state as it was."""
        grads = with_layers(self._masked(("layers",), self.params), 1)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        _, after = jax.eval_shape(
            lambda layer, grads, state: self.tx.update(
                grads, state, grads, layer=layer
            ),
            Layer(index, self.layers),
            grads,
            self.stacks.one,
        )
        before, after = by_path(self.stacks.one), by_path(after)
        for path in sorted({*before, *after}):
            if path not in before or path not in after:
                raise ValueError(DIFFERENT.format(path=path))
            if before[path].shape != after[path].shape:
                raise ValueError(
                    f"State leaf {path!r} of one layer has shape {before[path].shape} "
                    f"and, after an update, {after[path].shape}: tx decides by the "
                    "sizes of what it is given."
                )

    def shared(self, state: Any) -> dict[str, Any]:
        return self._pick(state, self.common)

    def own(self, part: str, state: Any) -> dict[str, Any]:
        return self._pick(state, self.owned[part])

    def _pick(self, state: Any, paths: set[str]) -> dict[str, Any]:
        return {k: v for k, v in by_path(state).items() if k in paths}

    def join(self, state: Any, leaves: dict[str, Any]) -> Any:
        return jax.tree.unflatten(
            jax.tree.structure(state), [leaves[path] for path in by_path(state)]
        )

    def __call__(
        self,
        part: tuple[str, ...],
        grads: Any,
        params: Any,
        state: Any,
        *,
        gain: Any,
        keep: Any,
        own_norm: Any,
        index: Any = None,
    ) -> Any:
        """Returns new parameters, own leaves and shared leaves of the part.

        Args:
          part: its names in the tree.
          grads: gradients of the part; of the layers, of one of them.
          params: parameters likewise.
          state: the whole state; of one layer, its leaves by path.
          gain: factor on the gradients, or None.
          keep: whether to leave all as it is, None where that is never so.
          own_norm: largest norm of the part's own gradient, or None.
          index: which layer.
        """
        extra = {} if index is None else {"layer": Layer(index, self.layers)}
        leaves = state if part == ("layers",) else by_path(state)
        shapes = self.parts[part]
        before = jax.tree.unflatten(
            jax.tree.structure(shapes), [leaves[path] for path in by_path(shapes)]
        )
        if own_norm is not None:
            gain = gain_of(jnp.sqrt(squares(grads)), own_norm)
        if gain is not None:
            # A 16-bit gradient is multiplied in float32 and rounded once.
            grads = jax.tree.map(lambda g: (g * gain).astype(g.dtype), grads)
        masked = self._masked(part, params)
        updates: Any
        updates, after = self.tx.update(
            self._masked(part, grads), before, masked, **extra
        )
        updates = parts_of(updates)
        updates = {name: updates[name] for name in part}
        new = optax.apply_updates(params, updates)
        if keep is not None:
            # Counters, too: a step that is left out does not count.
            new, after = jax.tree.map(
                lambda a, b: jnp.where(keep, a, b), (params, before), (new, after)
            )
        after = by_path(after)
        shared = {k: v for k, v in after.items() if k in self.common}
        return new, {k: v for k, v in after.items() if k not in shared}, shared


def _check_state(state: Any, expected: Any) -> None:
    found, wanted = (
        {path: (leaf.shape, leaf.dtype) for path, leaf in by_path(tree).items()}
        for tree in (state, expected)
    )
    for path in sorted({*found, *wanted}):
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"The state is not one of tx for these params: at {path!r} tx.init has "
                f"{wanted.get(path)}, the state {found.get(path)}."
            )


def count_layers(params: Any, names: tuple[str, ...]) -> int:
    parts, expected = parts_of(params), {"embed", "layers", *names}
    if set(parts) != expected:
        raise ValueError(
            f"params must have the parts {sorted(expected)}; got {sorted(parts)}. "
            "Name the head's parts with head_names=."
        )
    counts = {
        path_string(path): leaf.shape[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts["layers"])
    }
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            "Every leaf of params['layers'] must have the layers as its first axis; "
            f"got first axes {counts}."
        )
    return next(iter(counts.values()))[0]


def gain_of(norm: Array, largest: Any) -> Array:
    # As `optax.clip_by_global_norm` does it: a norm that is NaN reaches the gradient.
    return jnp.where(norm < largest, 1.0, largest / norm)


def squares(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    return sum(
        (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves), jnp.float32(0)
    )
