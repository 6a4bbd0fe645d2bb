"""Moments stay where they are; the basis takes their signs, or not."""

import dataclasses

from lowrank_optax.transport._protocol import Transport


@dataclasses.dataclass(frozen=True)
class align_signs(Transport):
    """Keeps the moments and flips new basis vectors to agree with the old ones.

    Singular vectors have arbitrary signs, which differ between backends. Moments
    outlive a refresh, so a flipped vector would turn its momentum around. This is
    the default.

    Examples:
      >>> import lowrank_optax as lro
      >>> part = lro.project(lro.svd(rank=4), transport=lro.align_signs())
    """


@dataclasses.dataclass(frozen=True)
class keep_moments(Transport):
    """Keeps the moments and takes the new basis with the signs it comes with.

    What the released GaLore code does; ``conventions="authors"`` implies it.

    Examples:
      >>> import lowrank_optax as lro
      >>> part = lro.project(lro.svd(rank=4), transport=lro.keep_moments())
    """

    aligns = False
