"""``state_shardings``: a sharding for every array of a state, from the parameters'."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.bracket.placement import (
    Piece,
    common_place,
    of_bracket,
    pieces_of,
    places_of,
)
from lowrank_optax.bracket.selection import broadcast_prefix
from lowrank_optax.bracket.start import (
    Described,
    described,
    outside_brackets,
)
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.quantization import is_quantized


def state_shardings(
    tx: optax.GradientTransformation, params: Any, param_shardings: Any
) -> Any:
    """Returns a sharding for every array of ``tx``'s state, bases included.

    An axis of the state takes the mesh axes of the parameter axis behind it: a basis
    ``[*batch, m, r]`` is sharded like the parameter's batch and projected axes, a
    projection ``[*batch, r, n]`` like its batch and kept axes; moments of full leaves
    like the parameter. Mesh axes of the parameter that a matrix would not keep (the
    moments, where the projected axis is a sharded one) go to its larger axis, if they
    divide it. Mesh and memory are those of the parameter. Counters and keys, which
    belong to none, are replicated on the largest mesh, in its default memory. Without
    this, ``jax.jit(tx.init)(params)`` puts all state on one device, and the compiler
    replicates the bases after a step.

    Args:
      tx: any Optax transformation, with or without brackets inside.
      params: parameters or ShapeDtypeStructs of them, Flax-boxed or not.
      param_shardings: a tree like ``params`` (a prefix will do) of ``NamedSharding``
        or of ``PartitionSpec``, on Auto or Explicit meshes. Only a ``NamedSharding``
        knows its mesh, and so which axes can be divided for the last rule.

    Returns:
      A tree like ``tx.init(params)``, of ``NamedSharding`` (or ``PartitionSpec``, as
      given), for ``jax.jit(tx.init, out_shardings=...)``. Specs are spelled as jit
      spells those of its results, so that the first step and the second are one
      program: without the axes at the end that have no name, but on an Explicit mesh
      (the one in use, where the specs name none) with an entry for every axis.

    Raises:
      ValueError: if ``param_shardings`` is not a tree like ``params`` or a parameter
        has none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import lowrank_optax as lro
      >>> tx, params = lro.galore(1e-3, rank=4), {"kernel": jnp.ones((64, 32))}
      >>> specs = lro.state_shardings(tx, params, {"kernel": P("data", "model")})
      >>> specs.basis["kernel"] == P("model")
      True
      >>> specs.inner_state.mu["kernel"] == P(None, "data")
      True
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    paths = [path_string(path) for path, _ in flat]
    shardings = _declared(paths, treedef, param_shardings)
    shapes = [unbox(leaf).shape for _, leaf in flat]
    # Brackets become `()`, which has no leaves, so the pieces come in the order in
    # which the walk below meets those outside of brackets.
    outside = iter(pieces_of(outside_brackets(tx), params))
    specs, common = [], common_place(shardings)

    def add(piece: Piece, owner: int | None) -> None:
        like = common if owner is None else shardings[owner]
        shape = () if owner is None else shapes[owner]
        specs.extend(places_of(piece, shape, like))

    state = described(tx, params)
    for node in jax.tree.leaves(state, is_leaf=_is_piece):
        if isinstance(node, Described):
            # A bracket behind `optax.masked` or `optax.partition` counts the leaves
            # that it sees, not all.
            places = [paths.index(leaf.path) for leaf in node.plan.leaves]
            for piece in of_bracket(node.planner, node.plan, node.state):
                add(piece, None if piece.owner is None else places[piece.owner])
        else:
            piece = next(outside)
            add(piece, piece.owner)
    structure = jax.tree.structure(jax.eval_shape(quiet_init(tx), params))
    return jax.tree.unflatten(structure, specs)


def _declared(paths: list[str], treedef: Any, param_shardings: Any) -> list[Any]:
    given = broadcast_prefix(param_shardings, treedef, "param_shardings")
    missing = [
        path
        for path, sharding in zip(paths, given, strict=True)
        if not isinstance(sharding, NamedSharding | PartitionSpec)
    ]
    if missing:
        raise ValueError(
            "state_shardings expected a NamedSharding or PartitionSpec for every "
            f"parameter; there is none for {missing}."
        )
    return given


def _is_piece(node: Any) -> bool:
    return isinstance(node, Described) or is_quantized(node) or is_box(node)
