"""SubTrack++'s pipeline around any projector: GrassWalk and GrassJump share it."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import ProjectOptions, takes_project_options
from lowrank_optax.projectors import Projector
from lowrank_optax.recovery import Recovery, recover_scale
from lowrank_optax.transport import Transport, rotate_moments


@takes_project_options
def tracked(
    projector: Projector,
    learning_rate: optax.ScalarOrSchedule | None,
    *,
    scale: float | Array = 0.25,
    growth_limit: float | Array | None = 1.01,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    base_optimizer: optax.GradientTransformation | None = None,
    transport: Transport | None = None,
    recovery: Recovery | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns the bracket; the arguments are those of ``lro.subtrack``."""
    authors = _recipe.is_authors(conventions)
    if transport is None:
        transport = rotate_moments(b1, b2, "paper" if authors else "debiased")
    tx = chain(
        project(projector, transport=transport, **options),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors),
        recovery or recover_scale(growth_limit=growth_limit),
        backproject(scale, learning_rate),
    )
    return _recipe.correct_bias(tx, base_optimizer, b1, b2, authors)
