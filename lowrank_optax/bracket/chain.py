"""The pipeline spelling of a bracket: project -> transformations -> backproject."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bracket.leaf import when
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.bracket.storage import Storage
from lowrank_optax.bracket.subspace import subspace
from lowrank_optax.leaves.part import Made, Part, made, transformation
from lowrank_optax.projectors import Projector, check_complete
from lowrank_optax.recovery import Recovery
from lowrank_optax.transport import Transport

_ORDER = "project -> transformations -> [recovery] -> backproject"


@dataclasses.dataclass(frozen=True, eq=False)
class project(Part):
    """Opens a bracket: which leaves are projected, on what, from which side.

    A part for ``lro.chain``, not a transformation.

    By default every matrix is projected, as it is recognised by its axes and by its
    place among the other leaves, then by its name; ``lro.dimension_numbers`` shows what
    was concluded. Full stay vectors (stacked ones, too), norms and biases, embeddings
    and output heads, what has axes of unknown meaning, and a matrix whose rank would
    exceed min(m, n) or whose low-rank state would not be smaller.
    ``lro.selection_report`` shows each decision and reason, and ``init`` warns
    (``lro.NotProjectedWarning``) where less than half is projected.

    Args:
      projector: forms the bases.
      transport: what a change of basis does to moments; None aligns signs.
      side: which side of the stored matrix the basis lies on. "short" (GaLore's
        rule; a square takes its input axis), "long" (smaller state), "left" (stored
        rows), "right" (stored columns), "both" (``P^T G Q``), "auto" (the unsharded
        axis if exactly one is sharded, as said by ``param_shardings`` or by the
        types of arrays on an Explicit mesh; else the short one).
      select: in place of the default rule, a regular expression searched in the leaf's
        path; a list of such words as ``["attn", "mlp"]``, of which a key of the path
        must have one (or the whole path match it as a regular expression); a callable
        ``(path, leaf) -> bool``; or a tree like the parameters (a prefix will do) of
        True and False. "all-linear" is the default rule without its
        regard for memory: every matrix, at r = min(m, n) at most. It is an error if
        nothing is chosen.
      min_size: leaves with fewer elements stay full.
      weight_dimension_numbers: a tree of ``lro.MatrixDimensionNumbers`` (None for
        leaves to keep full; a prefix will do), or a callable of the parameters that
        returns it, such as ``lro.dimension_numbers``. Axes not named are batch axes.
        It is an error if nothing is chosen.
      layer_axis: an axis that counts layers in all leaves with three axes or more, and
        in the stacked vectors among them. None concludes it from siblings; it is an
        error if they contradict it.
      clip_rank: run leaves whose rank exceeds min(m, n) at r = min(m, n).
      param_shardings: tree of shardings or partition specs for ``side="auto"``. With
        ``layer_axis=0`` the layers of a stack that lies on several devices are then
        projected and lifted one after another: what one takes, such as its basis,
        whole, is there once. All at once is faster on one device.
      full: another transformation for the leaves that are not projected.
      full_scale: factor on the update of those leaves, a number, an array or a schedule
        of the bracket's steps; None is 1.
      match: "adamw" makes the update of every projected matrix as long as that of
        ``optax.adamw(b1=0.9, b2=0.999)``: their root mean squares are equal at every
        step, to about 5 %, whatever the rank, the scale and the recovery, so that
        AdamW's learning rate and weight decay carry over. AdamW's moments of a sample
        of entries tell it: one in every column, and more in small matrices, where
        256 are wanted. They take as much state as one row of the projection, and are
        refused with an accumulation inside the bracket. None leaves updates as they
        are.
      dtype: dtype in which the inner transformation computes, projected and full leaves
        alike.
      state_dtype: dtype in which moments and bases are kept between steps; None is the
        parameter's, as in Optax (bfloat16 for a float16). What is kept in bfloat16 is
        rounded at random, so that a second moment still decays.
      mu_dtype: of ``mu``, ``trace`` and ``ema``; None is ``state_dtype``.
      nu_dtype: of ``nu``; None is ``state_dtype``.
      stagger: spread the refreshes of different matrices (and layers) over the gap.
      seed: seed of the bracket's random numbers.

    Raises:
      TypeError: if ``projector`` is not a projector.
      ValueError: if ``side`` is unknown.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.project(lro.power(rank=8), side="long").side
      'long'
    """

    projector: Projector
    _: dataclasses.KW_ONLY
    transport: Transport | None = None
    side: str = "short"
    select: Any = None
    min_size: int = 0
    weight_dimension_numbers: Any = None
    layer_axis: int | None = None
    clip_rank: bool = False
    param_shardings: Any = None
    full: optax.GradientTransformation | Made | None = None
    full_scale: Any = None
    match: str | None = None
    dtype: Any = jnp.float32
    state_dtype: Any = None
    mu_dtype: Any = None
    nu_dtype: Any = None
    stagger: bool = False
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.projector, Projector):
            raise TypeError(
                "lro.project expected a projector such as lro.power(rank=128), got "
                f"{type(self.projector).__name__}."
            )
        check_complete(self.projector)
        # Only for its checks: an unknown side is refused where it was written.
        self.selection()

    def selection(self) -> Selection:
        """Returns the options that decide which leaves are projected."""
        fields = (field.name for field in dataclasses.fields(Selection))
        return Selection(**{name: getattr(self, name) for name in fields})

    def storage(self) -> Storage:
        """Returns the dtypes in which moments and bases are kept."""
        asked = (self.state_dtype, self.mu_dtype, self.nu_dtype)
        return Storage(*(None if x is None else jnp.dtype(x) for x in asked))


@dataclasses.dataclass(frozen=True, eq=False)
class backproject(Part):
    """Closes a bracket: lifts the direction, ``U = scale * P N``, and may step.

    Args:
      scale: factor on the lifted direction (0.25 in the GaLore paper); full leaves
        are not scaled. May be traced.
      learning_rate: a number or schedule; everything that leaves the bracket is
        multiplied by its negative. The same as ``optax.scale_by_learning_rate``
        behind the bracket, without its pass over the full matrices.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.backproject(scale=0.25).scale
      0.25
    """

    scale: Any = 1.0
    learning_rate: optax.ScalarOrSchedule | None = None


def chain(*stages: Any) -> optax.GradientTransformationExtraArgs:
    """Builds a bracket from its stages, in the order the gradient meets them.

    ``lro.chain(lro.project(projector), *transformations, [recovery],
    lro.backproject(scale))``. What stands between sees the gradient in the
    subspace, so its state is small. The result is an ordinary transformation, to be
    used in ``optax.chain`` and everywhere else.

    What stands behind it, at full size, goes into an ``optax.chain`` around it, or into
    ``lro.behind`` if ``optax.MultiSteps`` stands inside.

    Args:
      *stages: one ``lro.project``, any number of Optax transformations, at most one
        recovery, one ``lro.backproject``.

    Returns:
      A ``GradientTransformationExtraArgs``.

    Raises:
      ValueError: if the stages come in another order.
      TypeError: if something is neither a part nor a transformation.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     lro.chain(
      ...         lro.project(lro.svd(rank=128, update_proj_gap=200)),
      ...         optax.scale_by_adam(),
      ...         lro.backproject(scale=0.25),
      ...     ),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
    """
    got = " -> ".join(_name(stage) for stage in stages) or "nothing"
    if len(stages) < 2 or not isinstance(stages[0], project):
        hint = ""
        if stages and isinstance(stages[0], Projector):
            hint = f" Wrap the projector: lro.project(lro.{_name(stages[0])}(...))."
        raise ValueError(f"lro.chain expected {_ORDER}, got {got}.{hint}")
    first, *middle, last = stages
    if not isinstance(last, backproject):
        raise ValueError(f"lro.chain expected {_ORDER}, got {got}.")
    recovery = middle.pop() if middle and isinstance(middle[-1], Recovery) else None
    for stage in middle:
        if isinstance(stage, Part) and not isinstance(stage, Made):
            raise ValueError(
                f"{_name(stage)} is out of place: lro.chain expected {_ORDER}, "
                f"got {got}."
            )
        if not isinstance(
            stage, optax.GradientTransformation | optax.MultiSteps | Made
        ):
            raise TypeError(
                "lro.chain expected an optax.GradientTransformation between project "
                f"and backproject, got {_name(stage)}; the whole chain: {got}."
            )
    # One stage alone keeps its own state, without a tuple around it. Several are
    # chained by `made`, which keeps their arrays within JAX's reach.
    inner = optax.identity()
    if middle:
        inner = middle[0] if len(middle) == 1 else made(optax.chain, *middle)
    return subspace(
        first.projector,
        inner,
        transport=first.transport,
        recovery=recovery,
        scale=last.scale,
        learning_rate=last.learning_rate,
        full=first.full,
        full_scale=first.full_scale,
        match=first.match,
        selection=first.selection(),
        dtype=first.dtype,
        storage=first.storage(),
        stagger=first.stagger,
        seed=first.seed,
    )


def behind(bracket: Any, *stages: Any) -> optax.GradientTransformationExtraArgs:
    """Chains transformations behind a bracket, in the bracket's time.

    ``optax.chain(bracket, *stages)``, but where ``optax.MultiSteps`` stands inside the
    bracket: the stages run, and their states advance, when it steps, once per
    accumulation. ``optax.chain`` would decay the weights at every micro-batch, and go
    through a schedule as many times too fast. In between the update is the bracket's,
    which is zero. The methods' ``weight_decay`` stands here by itself.

    Args:
      bracket: a bracket, or what this function returned.
      *stages: Optax transformations.

    Returns:
      A ``GradientTransformationExtraArgs``, with the state of ``optax.chain``.

    Raises:
      ValueError: at init, if only one of the inner optimizer and ``full`` accumulates:
        there is no one time to be had.

    Examples:
      >>> import optax
      >>> import lowrank_optax as lro
      >>> tx = lro.behind(
      ...     lro.chain(
      ...         lro.project(lro.power(rank=4)),
      ...         optax.MultiSteps(optax.scale_by_adam(), 4),
      ...         lro.backproject(),
      ...     ),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(optax.linear_schedule(1e-2, 0.0, 1000)),
      ... )
    """
    stages = tuple(
        stage.gradient_transformation()
        if isinstance(stage, optax.MultiSteps)
        else transformation(stage)
        for stage in stages
    )
    plain = optax.chain(bracket, *stages)
    each = [optax.with_extra_args_support(stage) for stage in stages]

    def init(params: Any) -> Any:
        state: Any = plain.init(params)
        _check_one_time(state[0])
        return state

    def update(updates, state, params=None, **extra_args):
        # A stage behind may accumulate by itself: that is its own affair.
        if not (isinstance(state, tuple) and _accumulations(state[0])):
            return plain.update(updates, state, params, **extra_args)
        before, *states = state
        updates, after = bracket.update(updates, before, params, **extra_args)
        done, kept = _has_stepped(before, after), [after]
        for stage, old in zip(each, states, strict=True):
            moved, new = stage.update(updates, old, params, **extra_args)
            updates = when(done, moved, updates)
            kept.append(when(done, new, old))
        return updates, tuple(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _accumulations(state: Any) -> list[tuple[bool, Any]]:
    """Returns the steps of every accumulation, and whether it is that of ``full``."""
    found = optax.tree_utils.tree_get_all_with_path(state, "gradient_step")
    return [("full_state" in jax.tree_util.keystr(path), x) for path, x in found]


def _check_one_time(state: Any) -> None:
    in_full = {of_full for of_full, _ in _accumulations(state)}
    has_full = [
        x
        for _, x in optax.tree_utils.tree_get_all_with_path(state, "full_state")
        if jax.tree.leaves(x)
    ]
    if has_full and len(in_full) == 1:
        one, other = ("`full`", "the inner optimizer")[
            :: -1 if in_full == {False} else 1
        ]
        raise ValueError(
            f"{one} accumulates gradients and {other} does not, so that what stands "
            "behind the bracket (weight decay, a schedule) would have two times to "
            "follow. Accumulate in both, or put optax.MultiSteps around the whole "
            "optimizer."
        )


def _has_stepped(before: Any, after: Any) -> Any:
    """Returns whether the accumulation inside the bracket is complete."""
    (_, new), *_ = sorted(_accumulations(after), key=lambda pair: pair[0])
    (_, old), *_ = sorted(_accumulations(before), key=lambda pair: pair[0])
    return new != old


def _name(stage: Any) -> str:
    return type(stage).__name__
