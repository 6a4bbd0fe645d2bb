"""``Recipe``: the arguments that methods share, and the stages that they make.

Each shared argument stands here once, with its type, default and description. A method
picks the groups that it takes, ``**options: Unpack[...]``, and the decorator ``method``
completes its signature and its docstring from them.
"""

import dataclasses
import types
from typing import Annotated, Any, TypedDict

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import behind, project
from lowrank_optax.leaves.part import made
from lowrank_optax.projectors import Projector, whole
from lowrank_optax.quantization import Codec, blockwise_int8
from lowrank_optax.recovery import Recovery
from lowrank_optax.transforms import (
    decay_after,
    decay_before,
    scale_by_bias_correction,
    scale_by_raw_adam,
)
from lowrank_optax.transport import Transport, keep_moments

Transformation = optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True)
class Arg:
    """Default and description of a shared argument."""

    default: Any
    text: str


class Matrices(TypedDict, total=False):
    """The options of ``lro.project``, where their defaults and descriptions stand.

    Those that say something where matrices are whole, ``lro.whole()``.
    """

    select: Any
    weight_dimension_numbers: Any
    layer_axis: int | None
    param_shardings: Any
    full: Any
    full_scale: float | optax.Schedule | Array | None
    match: str | None
    dtype: Any
    state_dtype: Any


class AnySize(Matrices, total=False):
    """All of them, where matrices are projected."""

    side: str
    clip_rank: bool
    mu_dtype: Any
    nu_dtype: Any
    stagger: bool
    seed: int


class Leaves(AnySize, total=False):
    """All of them; ``min_size`` has another meaning where moments are encoded."""

    min_size: int


class Decay(TypedDict, total=False):
    """Decoupled weight decay."""

    weight_decay: Annotated[
        float | Array | None,
        Arg(None, "decoupled decay per unit of learning rate; None has no such stage."),
    ]
    mask: Annotated[Any, Arg(None, "leaves to decay, as in ``optax.masked``.")]


class Scale(TypedDict, total=False):
    """The factor of the bracket."""

    scale: Annotated[
        float | Array,
        Arg(0.25, "factor on the lifted direction; full leaves are not scaled."),
    ]


class Gap(TypedDict, total=False):
    """The schedule of the bases."""

    update_proj_gap: Annotated[
        int, Arg(200, "steps from one basis to the next, the first at step 0.")
    ]


class Moments(TypedDict, total=False):
    """Adam's own arguments."""

    b1: Annotated[float | Array, Arg(0.9, "decay of the first moment.")]
    b2: Annotated[float | Array, Arg(0.999, "decay of the second moment.")]
    eps: Annotated[
        float | Array | None,
        Arg(
            None,
            "added to the root of the second moment; None is 1e-8, or the released "
            'code\'s 1e-6 with ``conventions="authors"`` where there are any.',
        ),
    ]


class Adam(Moments, total=False):
    """Adam, or another optimizer in its place."""

    base_optimizer: Annotated[
        optax.GradientTransformation | None,
        Arg(
            None,
            "the inner transformation in place of Adam: any Optax direction that "
            "treats leading axes as batch, such as ``optax.scale_by_lion()``.",
        ),
    ]


class Given(TypedDict, total=False):
    """A projector in place of the method's own."""

    projector: Annotated[
        Projector | None,
        Arg(
            None,
            "how bases are formed, in place of the method's own way; it brings its own "
            "rank, gap and dtype.",
        ),
    ]


class Transported(TypedDict, total=False):
    """The moments at a change of basis."""

    transport: Annotated[
        Transport | None,
        Arg(
            None,
            "what a new basis does to the moments, in place of the method's own way; "
            "unless it says otherwise, signs are aligned with the old basis (nothing "
            'is done with ``conventions="authors"``).',
        ),
    ]


class Stored(TypedDict, total=False):
    """The storage of the bases."""

    basis_dtype: Annotated[
        Any, Arg(None, "storage dtype of the basis; None is ``state_dtype``.")
    ]


class Conventions(TypedDict, total=False):
    """Optax's conventions or the authors'."""

    conventions: Annotated[
        str,
        Arg(
            "optax",
            '"optax", or "authors" to reproduce the released code: see below.',
        ),
    ]


class Recovered(TypedDict, total=False):
    """The part of the gradient outside the subspace."""

    recovery: Annotated[
        Recovery | None,
        Arg(None, "what the update gets from outside the subspace."),
    ]


class Base(Scale, Decay, Leaves):
    """What every method with a bracket takes."""


class Bases(Gap, Given, Transported, Stored):
    """When, how and in what dtype bases are formed, and what they do to moments."""


class Usual(Base, Gap, Adam, Transported):
    """What most methods take."""


class Options(Usual, Given, Stored, Conventions):
    """All that a method in GaLore's manner takes besides its own."""


class Encoded(Scale, Decay, AnySize, Gap, Adam, Given, Transported, Conventions):
    """What it takes if ``min_size`` counts the moments that are worth encoding."""


# Descriptions of what several methods list themselves; a docstring may say otherwise.
COMMON = {
    "learning_rate": "a number or an Optax schedule.",
    "rank": "basis vectors r: an int, a fraction of min(m, n), or a callable of the "
    "leaf's path.",
    "granularity": 'one step size per "column" of the matrix, or one for the whole, '
    '"tensor".',
    "error_dtype": "storage dtype of E; None is ``state_dtype``.",
    "block": "elements of a moment per scale.",
    "min_size": "matrices with fewer moments keep them in ``state_dtype``.",
    "growth_limit": "largest ratio of a norm to that of the step before; None for no "
    "limit. See ``lro.recover_scale`` for its reset.",
    "entry_limit": "largest entry of ``G diag(phi)``, in root mean squares of N_j; "
    'None for no limit, as with ``conventions="authors"``. See ``lro.recover_scale``.',
    "renew_below": "share of the gradient, beyond a random basis' share, below which "
    "the basis is found anew instead of turned; None for never, as with "
    '``conventions="authors"``. See ``lro.grassmann``.',
}


class Recipe(types.SimpleNamespace):
    """The shared arguments of one call by name, and the stages that they make.

    What stands inside a bracket is made where it is used, by ``made``: arrays among
    the arguments then stay arguments of the compiled step.
    """

    @property
    def authors(self) -> bool:
        """Whether the released code is reproduced."""
        # Options of a group that the method does not take are absent, here and below.
        chosen = getattr(self, "conventions", "optax")
        return _checks.choice("conventions", chosen, ("optax", "authors")) == "authors"

    def open(self, projector: Projector, transport: Transport | None = None) -> project:
        """Opens the bracket; ``transport`` is the method's own, None aligns signs."""
        kept = keep_moments() if self.authors else None
        given = getattr(self, "transport", None)
        if given is None:
            given = kept if transport is None else transport
        names = Leaves.__annotations__.keys() & vars(self).keys()
        leaves = {name: getattr(self, name) for name in names}
        return project(projector, transport=given, **leaves)

    def matrices(self, adam: Any = None) -> project:
        """Opens a bracket around whole matrices; vectors and tables get Adam."""
        if self.full is None:
            self.full = self.adam() if adam is None else adam
        return self.open(whole())

    def bases(self, factory: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the user's projector, or the method's own with the chosen dtype."""
        if getattr(self, "projector", None) is not None:
            return self.projector
        if getattr(self, "basis_dtype", None) is not None:
            kwargs["basis_dtype"] = self.basis_dtype
        return factory(*args, **kwargs)

    def adam(self, authors: bool | None = None) -> Any:
        """Returns what stands in the bracket: the user's choice, or Adam.

        The authors' Adam does not correct its bias: ``correct`` does, behind the
        bracket and so behind its limiter, or ``corrected_adam`` inside.
        """
        authors = self.authors if authors is None else authors
        inner: Any = getattr(self, "base_optimizer", None)
        if inner is None and authors:
            eps = 1e-6 if self.eps is None else self.eps
            inner = made(scale_by_raw_adam, self.b1, self.b2, eps)
        elif inner is None:
            eps = 1e-8 if self.eps is None else self.eps
            inner = made(optax.scale_by_adam, self.b1, self.b2, eps)
        return inner

    def corrected_adam(self) -> Any:
        """Returns ``adam`` with its bias corrected inside, where it is small."""
        if not self._corrects:
            return self.adam()
        correction = made(scale_by_bias_correction, self.b1, self.b2)
        return made(optax.chain, self.adam(), correction)

    def correct(self, tx: Transformation) -> Transformation:
        """Corrects the authors' Adam behind the bracket."""
        if not self._corrects:
            return tx
        return behind(tx, scale_by_bias_correction(self.b1, self.b2))

    @property
    def _corrects(self) -> bool:
        # An optimizer that is given, and Optax' Adam, see to their bias themselves.
        return getattr(self, "base_optimizer", None) is None and self.authors

    def decayed(
        self, tx: Transformation, learning_rate: Any, authors: bool | None = None
    ) -> Transformation:
        """Adds the decay, if there is one, of the weights before or after the step."""
        if self.weight_decay is None:
            return tx
        authors = self.authors if authors is None else authors
        form = decay_after if authors else decay_before
        return behind(tx, form(learning_rate, self.weight_decay, self.mask))


def eight_bits(block: int, authors: bool = False) -> tuple[Codec, Codec]:
    """Returns the 8-bit codecs of first and second moments."""
    if authors:
        return (
            blockwise_int8(block, signed=True, blocks="flat"),
            blockwise_int8(block, signed=False, blocks="flat", keep_nonzero=False),
        )
    # Computed codes: on a TPU a lookup costs far more than arithmetic.
    return (
        blockwise_int8(block, signed=True, signed_scale=True, exact=False),
        blockwise_int8(block, signed=False, exact=False),
    )
