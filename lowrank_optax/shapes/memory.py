"""Bytes of optimizer state, exactly, without allocating any."""

import collections
import dataclasses
import math
from typing import Any

import jax
import optax

from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.leaves.boxes import is_box
from lowrank_optax.leaves.matrix import path_string

_ROLES = {
    "basis": "basis",
    "mu": "mu",
    "trace": "mu",
    "ema": "mu",
    "nu": "nu",
    "row": "nu",
    "col": "nu",
    "recovery_state": "recovery",
    "v_row": "nu",
    "v_col": "nu",
}

ENCODED = ("codes", "scales", "zeros")

# Fields of a bracket's state that hold a tree of their own for every parameter.
_PER_PARAMETER = ("basis", "pending", "recovery_state", "sample")


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer state, per role and per parameter; printable.

    Attributes:
      entries: (parameter path or "", role) -> bytes.
    """

    entries: dict[tuple[str, str], int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.entries.values())

    @property
    def by_role(self) -> dict[str, int]:
        """Bytes of bases, first and second moments, recovery, and the rest.

        "basis" is all that the projector stores, an optimizer's state included.
        """
        return self._sum(1)

    @property
    def by_parameter(self) -> dict[str, int]:
        """Bytes per parameter; "" holds what belongs to none (counters, keys)."""
        return self._sum(0)

    def _sum(self, which: int) -> dict[str, int]:
        sums: dict[str, int] = collections.defaultdict(int)
        for key, size in self.entries.items():
            sums[key[which]] += size
        return dict(sums)

    def __str__(self) -> str:
        """Returns the table."""
        roles = ("basis", "mu", "nu", "recovery", "other")
        rows: list[tuple[str, ...]] = [("parameter", *roles, "total")]
        for path, total in self.by_parameter.items():
            sizes = [self.entries.get((path, role), 0) for role in roles]
            rows.append((path or "(counters)", *(f"{x:,}" for x in (*sizes, total))))
        sums = [self.by_role.get(role, 0) for role in roles]
        rows.append(("total", *(f"{x:,}" for x in (*sums, self.total))))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def state_bytes(tx: optax.GradientTransformation, params: Any) -> StateBytes:
    """Counts the bytes of ``tx``'s state for ``params``, without allocating.

    Args:
      tx: any Optax transformation.
      params: parameters or ShapeDtypeStructs of them.

    Returns:
      The bytes per role ("basis", "mu", "nu", "recovery", "other") and parameter.
      ``total`` is the sum over the real state's arrays, exactly.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((512, 1376), jnp.float32)}
      >>> lro.state_bytes(lro.galore(1e-3, rank=128), shapes).by_role["basis"]
      262144
    """
    # A function of its own: eval_shape remembers those that it has traced.
    state = jax.eval_shape(quiet_init(tx), params)
    entries: dict[tuple[str, str], int] = collections.defaultdict(int)
    for path, owner, leaf in owned_leaves(state, params):
        # The outermost name decides: moments of an optimizer of the basis are "basis".
        role = next((_ROLES[key] for key in path if key in _ROLES), "other")
        entries[owner or "", role] += leaf.size * leaf.dtype.itemsize
    return StateBytes(dict(entries))


def bytes_per_device(tree: Any, shardings: Any = None) -> int:
    """Counts the bytes that a tree of arrays takes on one device, from shapes alone.

    An array of shape ``s`` under a sharding takes the product of ``shard_shape(s)``
    times the bytes of an entry; what is replicated counts whole.

    Args:
      tree: arrays or ShapeDtypeStructs.
      shardings: a tree like it of shardings, over devices or an ``abstract_mesh``.
        None: all of it lies on one device.

    Returns:
      The bytes on the device that holds the most; with equal shards, on each.

    Raises:
      ValueError: if the two trees differ, or a sharding does not divide its array.

    Examples:
      A state of a 512 x 1376 matrix, its parameter cut over eight devices:

      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jax.ShapeDtypeStruct((512, 1376), jnp.float32)}
      >>> mesh = lro.abstract_mesh({"fsdp": 8})
      >>> places = {"kernel": NamedSharding(mesh, P("fsdp"))}
      >>> lro.bytes_per_device(params, places) * 8 == lro.bytes_per_device(params)
      True
      >>> tx = lro.galore(1e-3, rank=128)
      >>> state = jax.eval_shape(tx.init, params)
      >>> lro.bytes_per_device(state, lro.state_shardings(tx, params, places))
      208913
    """

    def size(leaf: Any, sharding: Any = None) -> int:
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    trees = (tree,) if shardings is None else (tree, shardings)
    return sum(jax.tree.leaves(jax.tree.map(size, *trees)))


def owned_leaves(
    state: Any, params: Any
) -> list[tuple[tuple[str, ...], str | None, Any]]:
    """Pairs every leaf of a state with the parameter it belongs to.

    A state leaf belongs to the parameter whose path its own path ends with, or, in
    fields that hold a tree for every parameter, has right behind the field.

    Args:
      state: an optimizer state or the shapes of one.
      params: the parameters or their shapes.

    Returns:
      (keys of the path without the parameter's, the parameter's path, the leaf).
    """
    paths = {
        tuple(_keys(path)): path_string(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    }
    longest = max((len(keys) for keys in paths), default=0)
    owned = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = tuple(_keys(path))
        owned.append((*_owner(keys, _field(path), paths, longest), leaf))
    return owned


def _field(path: tuple[Any, ...]) -> int | None:
    """Returns where the path enters a field that holds a tree for every parameter."""
    fields = (
        i
        for i, key in enumerate(path)
        if isinstance(key, jax.tree_util.GetAttrKey) and key.name in _PER_PARAMETER
    )
    return next(fields, None)


def _owner(keys, field, paths, longest) -> tuple[tuple[str, ...], str | None]:
    if field is not None:
        start = field + 1
        for length in range(min(longest, len(keys) - start), -1, -1):
            owner = paths.get(keys[start : start + length])
            if owner is not None:
                return (*keys[:start], *keys[start + length :]), owner
    # The longest path wins, since another, shorter path may end alike. The empty path
    # is that of parameters which are one bare array.
    for length in range(min(longest, len(keys)), -1, -1):
        owner = paths.get(keys[len(keys) - length :])
        if owner is not None:
            return keys[: len(keys) - length], owner
    if keys and keys[-1] in ENCODED:  # the arrays that an encoded one is made of
        inner, owner = _owner(keys[:-1], field, paths, longest)
        return (*inner, keys[-1]), owner
    return keys, None


def _keys(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]
