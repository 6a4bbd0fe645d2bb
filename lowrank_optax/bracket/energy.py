"""``captured_energy``: the share of every gradient that the optimizer's bases hold."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lowrank_optax._meshes import explicit_mesh, with_auto_axes
from lowrank_optax.bracket.found import bracket_states, described_brackets, leaf_of
from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.plan import LeafPlan
from lowrank_optax.bracket.start import described
from lowrank_optax.bracket.subspace import clock_of
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.linalg.products import HIGHEST, Operand, by_blocks, gram, wide
from lowrank_optax.projectors import At


def captured_energy(
    tx: optax.GradientTransformation, gradients: Any, state: Any, params: Any
) -> dict[str, Array]:
    r"""Returns which share of each gradient's energy lies in its basis.

    For every projected matrix ``G [m, n]`` and the basis ``P [m, r]`` in the state::

        R = P^T G          share = tr(R^T (P^T P)^-1 R) / |G|^2

    which is ``|P^T G|^2 / |G|^2`` for orthonormal columns: 1 if no part of the gradient
    is lost, about ``r / m`` for a basis that knows nothing of it. It costs one
    projection per matrix. The state behind a step tells what the basis of that step
    had held, unless the method moves its basis after use; the state before it tells
    the same of a gradient that the basis has not seen.

    Args:
      tx: an optimizer with at least one bracket inside, in any nesting.
      gradients: a tree like the parameters.
      state: what ``tx.init`` or ``tx.update`` returned.
      params: the parameters.

    Returns:
      For the path of every projected leaf, an array of the shape of its batch axes (a
      scalar for one matrix, ``[L]`` for a stack of L layers). 0 for a gradient of
      zeros; NaN for one that is not finite, and for a basis without full rank.

    Raises:
      ValueError: if there is no bracket in ``tx``, the state is another one's, or a
        projected leaf has no gradient of its shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.galore(1e-3, rank=4)
      >>> gradients = {"kernel": jnp.zeros((64, 32)).at[0].set(1.0)}
      >>> _, state = tx.update(gradients, tx.init(params), params)
      >>> shares = lro.captured_energy(tx, gradients, state, params)
      >>> print(f"{shares['kernel']:.2f}")
      1.00
    """
    brackets = described_brackets(described(tx, params))
    if not brackets:
        raise ValueError(
            "captured_energy found no low-rank bracket in this transformation; "
            "expected one built by lro.chain, lro.subspace or a method of lro."
        )

    def shares(gradients: Any, state: Any) -> dict[str, Array]:
        arrays = {
            path_string(keys): unbox(leaf)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(
                gradients, is_leaf=is_box
            )
        }
        found = {}
        for bracket, own in zip(brackets, bracket_states(brackets, state), strict=True):
            for position, matrix in bracket.plan.matrices():
                leaf, stored, _ = leaf_of(bracket, own, position)
                _check(bracket.plan.leaves[position], arrays)
                seen = matrix.operand(arrays[matrix.path])
                # Where layers are projected in turn, their bases are formed in turn.
                found[matrix.path] = leaf.lift(
                    lambda *args, leaf=leaf: _share(leaf, *args),
                    leaf.at(clock_of(own)),
                    stored,
                    seen,
                    in_turn=leaf.in_turn,
                )
        return found

    mesh = explicit_mesh((gradients, state))
    if mesh is None:
        return shares(gradients, state)
    whole = NamedSharding(mesh, PartitionSpec())
    return with_auto_axes(mesh, whole, shares, gradients, state)


def _check(leaf: LeafPlan, gradients: dict[str, Array]) -> None:
    found = gradients.get(leaf.path)
    if found is None or found.shape != leaf.shape:
        what = "none" if found is None else f"one of the shape {found.shape}"
        raise ValueError(
            f"captured_energy expected a gradient of the shape {leaf.shape} for leaf "
            f"{leaf.path!r}, found {what}; pass a tree like the parameters."
        )


def _share(leaf: LowLeaf, at: At, stored: Any, gradient: Operand) -> Array:
    """Returns the share of one matrix."""
    basis = leaf.basis_of(stored, at)
    # In units of the largest entry, whose square is in range.
    size = jnp.where(gradient.peak > 0, wide(gradient.peak), 1.0)
    gradient = gradient.map(lambda x: wide(x) / size)
    low = wide(leaf.projector.down(leaf.matrix, basis, gradient))
    if not leaf.projector.orthonormal:
        low = _orthonormal(basis, low)
    whole = jnp.sum(jnp.square(gradient.stored))
    # Not above 1, which rounding may reach; a NaN stays one.
    return jnp.minimum(jnp.sum(jnp.square(low)) / jnp.where(whole == 0, 1, whole), 1)


def _orthonormal(basis: Any, low: Array) -> Array:
    """Returns ``R`` in an orthonormal basis of the same space, on one side or both.

    With ``P^T P = L L^T`` the columns of ``P L^-T`` are orthonormal, and
    ``L^-1 P^T G`` is what they see.
    """
    solve = jax.lax.linalg.triangular_solve
    left, *right = [jnp.linalg.cholesky(gram(wide(p))) for p in jax.tree.leaves(basis)]
    low = solve(left, low, left_side=True, lower=True)
    if not right:
        return low
    eye = jnp.eye(right[0].shape[-1], dtype=right[0].dtype)
    inverse = solve(right[0], eye, left_side=True, lower=True)
    return by_blocks(low, inverse.mT, HIGHEST)
