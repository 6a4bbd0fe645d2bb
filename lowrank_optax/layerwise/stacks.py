"""``Stacks``: where the state of stacked layers has its layers, and that of one."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax._meshes import explicit_sharding
from lowrank_optax.leaves.layout import names_of
from lowrank_optax.quantization import is_quantized


class Stacks:
    """The state that an optimizer keeps of stacked layers.

    Attributes:
      layers: how many there are.
      whole: the state's shapes by path.
      cut: paths of the arrays whose first axis is that of the layers.
      one: the state of one layer, of ShapeDtypeStructs: the same arrays at the same
        paths, those that can be cut with one layer.
    """

    def __init__(self, init: Callable[[Any], Any], tree: Any, layers: int):
        """Asks ``init``.

        Args:
          init: of the optimizer.
          tree: parameters, arrays or ShapeDtypeStructs, with the stacks as its part
            ``"layers"``; other parts may be masked.
          layers: how many layers the stacks have.

        Raises:
          ValueError: if there is state of the layers that has them along another axis
            than its first.
        """
        state = jax.eval_shape(init, with_layers(tree, layers))
        longer = by_path(jax.eval_shape(init, with_layers(tree, layers + 1)))
        self.layers, self.whole = layers, by_path(state)
        if changed := sorted(set(self.whole) ^ set(longer)):
            raise ValueError(DIFFERENT.format(path=changed[0]))
        # What grows with the number of layers belongs to them; only what grows by one
        # along its first axis can be cut. No size is compared with another axis', and
        # one layer alone is not asked about: an init might decide otherwise on it.
        grown = {
            path: (leaf.shape, longer[path].shape)
            for path, leaf in self.whole.items()
            if leaf.shape != longer[path].shape
        }
        for path, (shape, after) in sorted(grown.items()):
            if not shape or (shape[0], after) != (layers, (layers + 1, *shape[1:])):
                raise ValueError(_NOT_FIRST.format(path, shape, layers, after))
        self.cut = set(grown)
        self.one = jax.tree_util.tree_map_with_path(
            self._first, state, is_leaf=is_quantized
        )

    def _first(self, path: Any, node: Any) -> Any:
        """Returns one layer's share of an array, or of an encoded one."""
        if not is_quantized(node):
            cut = jax.tree_util.keystr(path) in self.cut
            return _resized(node, 1) if cut else node
        below = by_path(node)
        here = jax.tree_util.keystr(path)
        arrays = {
            key: _resized(leaf, 1) if here + key in self.cut else leaf
            for key, leaf in below.items()
        }
        one = jax.tree.unflatten(jax.tree.structure(node), list(arrays.values()))
        tail = node.tail
        if arrays != below and len(node.shape) == len(tail):
            # A stack of vectors was encoded as one matrix: its rows are the layers.
            tail = (1, *tail[1:])
        return one.with_tail(tail)

    def state_of(self, leaves: dict[str, Any]) -> Any:
        """Puts one layer's arrays, by path, into the structure of its state."""
        return jax.tree.unflatten(
            jax.tree.structure(self.one), [leaves[path] for path in self.whole]
        )


DIFFERENT = (
    "State leaf {path!r} exists for a part of the parameters and not for the whole, or "
    "the other way round, or for one number of layers and not for another: tx chooses "
    "leaves by what it sees of the tree (a min_size between one layer and all of them, "
    "say). Choose them by name, with select=."
)
_NOT_FIRST = (
    "State leaf {0!r} has shape {1} for {2} layers and {3} for one more: it cannot be "
    "cut into layers along its first axis. Use an optimizer that keeps layers apart; "
    "low-rank methods need layer_axis=0."
)


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, in the tree's order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def part_of(path: Any) -> Any:
    """Returns the part of the parameters that a leaf's path begins with."""
    return names_of(path[:1])[0]


def parts_of(params: Any) -> dict[str, Any]:
    """Returns the parts of the parameters by name, whatever holds them."""
    pairs = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: node is not params
    )
    return {part_of(path): part for path, part in pairs}


def like_params(params: Any, parts: dict[str, Any]) -> Any:
    """Returns parts in what holds the parameters: a mapping, a module, a tuple."""
    treedef = jax.tree.structure(params, is_leaf=lambda node: node is not params)
    return treedef.unflatten(parts[name] for name in parts_of(params))


def with_layers(tree: Any, layers: int) -> Any:
    """Returns the shapes of the tree with so many layers in its stacks."""

    def sized(path: Any, leaf: Any) -> Any:
        first = layers if part_of(path) == "layers" else None
        return _resized(leaf, first)

    return jax.tree_util.tree_map_with_path(sized, tree)


def _resized(leaf: Any, first: int | None) -> Any:
    shape = leaf.shape if first is None else (first, *leaf.shape[1:])
    # On an Explicit mesh the sharding is part of the type, and brackets read it.
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=explicit_sharding(leaf))
