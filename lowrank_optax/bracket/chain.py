"""The pipeline spelling of a bracket: project -> transformations -> backproject."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from lowrank_optax.bracket.selection import Selection
from lowrank_optax.bracket.subspace import subspace
from lowrank_optax.leaves.part import Made, Part, made
from lowrank_optax.projectors import Projector
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
        must have one (or the whole path match it as a regular expression); or a
        callable ``(path, leaf) -> bool``. "all-linear" is the default rule without its
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
      dtype: dtype of the inner transformation, projected and full leaves alike.
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
    dtype: Any = jnp.float32
    stagger: bool = False
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.projector, Projector):
            raise TypeError(
                "lro.project expected a projector such as lro.power(rank=128), got "
                f"{type(self.projector).__name__}."
            )
        # Only for its checks: an unknown side is refused where it was written.
        self.selection()

    def selection(self) -> Selection:
        """Returns the options that decide which leaves are projected."""
        fields = (field.name for field in dataclasses.fields(Selection))
        return Selection(**{name: getattr(self, name) for name in fields})


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
        selection=first.selection(),
        dtype=first.dtype,
        stagger=first.stagger,
        seed=first.seed,
    )


def _name(stage: Any) -> str:
    return type(stage).__name__
