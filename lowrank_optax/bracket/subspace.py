"""THE combinator: an Optax transformation run inside a low-rank subspace.

Read ``_step`` first: every method of this library is that function with one part
chosen for each slot.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _checks
from lowrank_optax._meshes import under_auto_axes
from lowrank_optax.bracket.handed import hands_arrays_over
from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.bracket.state import Bracket
from lowrank_optax.bracket.trees import Leaves
from lowrank_optax.leaves.part import transformation
from lowrank_optax.leaves.slices import with_layer
from lowrank_optax.projectors import Projector
from lowrank_optax.recovery import Recovery
from lowrank_optax.transport import Transport, align_signs


@hands_arrays_over
def subspace(
    projector: Projector,
    inner: optax.GradientTransformation | optax.MultiSteps,
    *,
    transport: Transport | None = None,
    recovery: Recovery | None = None,
    scale: Any = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    full: optax.GradientTransformation | optax.MultiSteps | None = None,
    selection: Selection | None = None,
    dtype: Any = jnp.float32,
    stagger: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on projected gradients and lifts what it returns.

    For every projected matrix ``G [m, n]`` with basis ``P [m, r]``, r << m::

        P  = refresh(G, P)  when due          R = P^T G          [r, n]
        N, state = inner(R, state)            U = scale * P N    [m, n]

    so the inner optimizer's state has ``r n`` elements in place of ``m n``. Leaves
    that are not projected go through the same inner at full size and unscaled.
    ``lro.chain`` is the spelling of this primitive as a pipeline.

    Args:
      projector: forms the bases (``lro.power``, ``lro.svd``, ...).
      inner: any Optax transformation that treats leading axes as batch. It sees
        projections as updates, projected parameters as ``params``, and a
        ``SubspaceView`` as the extra argument ``subspace``.
      transport: what a change of basis does to the moments; None aligns signs.
      recovery: what the update gets from outside the subspace; None discards it.
      scale: factor on the lifted direction (not on full leaves); may be traced.
      learning_rate: a number or schedule whose negative multiplies everything that
        leaves the bracket, as ``optax.scale_by_learning_rate`` behind it would, but
        where the matrices are small; None leaves it out.
      full: another transformation for the leaves that are not projected, for
        inners that accept matrices only.
      selection: which leaves are projected; None is the default rule.
      dtype: the inner transformation's dtype, whatever parameters and gradients are.
      stagger: spread the refreshes of different matrices over the gap.
      seed: seed of the bracket's random numbers.

    Returns:
      A ``GradientTransformationExtraArgs`` with a ``SubspaceState``.

    Raises:
      TypeError: if ``projector`` or ``inner`` is something else.
      ValueError: if ``transport`` moves moments and the projector has no rotation;
        at init, if a leaf selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = lro.subspace(lro.power(rank=2), optax.scale_by_adam())
      >>> state = tx.init({"w": jnp.ones((64, 32))})
      >>> state.basis["w"].shape, state.inner_state.mu["w"].shape
      ((32, 2), (2, 64))
    """
    if not isinstance(projector, Projector):
        raise TypeError(
            "Expected a projector such as lro.power(rank=128), got "
            f"{type(projector).__name__}."
        )
    transport = align_signs() if transport is None else transport
    if transport.moves and not projector.stores_basis:
        raise ValueError(
            f"{type(projector).__name__} keeps no basis, so there is no rotation to "
            "carry moments along. Use transport=lro.keep_moments()."
        )
    if transport.gathers and not projector.selects:
        raise ValueError(
            f"{type(transport).__name__} carries over the basis vectors that two bases "
            f"share, and those of lro.{type(projector).__name__} share none. Use "
            "transport=lro.rotate_moments(), or a projector such as lro.dct."
        )
    bracket = Bracket(
        projector,
        _transformation("inner", inner),
        transport,
        recovery,
        None if full is None else _transformation("full", full),
        selection or Selection(),
        scale,
        learning_rate,
        dtype,
        stagger,
        seed,
    )

    def update(updates, state, params=None, **extra_args):
        plan = bracket.plan(updates if params is None else params)
        step = functools.partial(_step, bracket, plan)
        step, extra_args = with_layer(step, extra_args)
        return under_auto_axes(step, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(bracket.init, update)


def _step(bracket: Bracket, plan: Plan, updates, state, params, extra_args):
    """One step of the bracket. The comments number the lines of the design."""
    leaves = Leaves(bracket, plan, updates, state, params)

    # 1. matrix view of every projected leaf, and what the recovery adds to it
    gradients = leaves.enter(leaves.view(updates))
    # 2. a new basis where one is due, and 3. the moments carried over to it
    with jax.named_scope("lowrank/refresh"):
        renewed, transported = leaves.refresh(gradients)
    # 4. project
    with jax.named_scope("lowrank/project"):
        bases = leaves.bases(renewed)
        projected = leaves.down(renewed, gradients)
    # 5. the inner optimizer, in the subspace and on the full leaves
    with jax.named_scope("lowrank/inner"):
        view = leaves.subspace_view(gradients, bases, projected, transported)
        directions, inner_state, full_state = leaves.inner(view, renewed, extra_args)
    # 6. recover (and step, if the learning rate is ours), 7. backproject
    with jax.named_scope("lowrank/backproject"):
        lifted, recovery_state = leaves.lift(
            view, gradients, directions, renewed, inner_state
        )
        directions = leaves.descend(directions)
    # 8. undo the matrix view, 9. back to the gradient's dtype
    new_updates = leaves.undo(lifted, directions)
    # 10. move the bases that move after use, and store
    with jax.named_scope("lowrank/advance"):
        renewed = leaves.advance(renewed, gradients, view, inner_state)
    return new_updates, leaves.state(renewed, inner_state, full_state, recovery_state)


def _transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    tx = transformation(tx)
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    tx = _checks.transformation(name, tx, "scale_by_adam()")
    return optax.with_extra_args_support(tx)
