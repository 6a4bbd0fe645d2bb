"""``gwt``: Adam on the wavelet approximation of the gradient, details without state."""

import math
from typing import Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import wavelet as project_on
from lowrank_optax.recovery import wavelet_details
from lowrank_optax.transport import align_signs


class _Options(has.Base, has.Adam, has.Conventions): ...


@method(
    "GWT",
    "2501.07237",
    "GWT: Scalable Optimizer State Compression (2025)",
    # The details are divided by b2 and eps, too, if they are divided by nu.
    ignored=("b1 beside base_optimizer", "b2, eps beside base_optimizer, normalize"),
)
def gwt(
    learning_rate: optax.ScalarOrSchedule,
    level: int = 2,
    *,
    wavelet: str = "haar",
    axis: int | str = -2,
    detail_clip: float | Array | None = None,
    growth_limit: float | Array | None = 1.01,
    normalize: bool | str = True,
    **options: Unpack[_Options],
) -> Transformation:
    """GWT: Adam on the wavelet approximation of the gradient, details without state.

    For a matrix ``W [m, n]`` with gradient ``G`` and its wavelet bands along m, ``A``
    with ``r = ceil(m / 2^level)`` rows (Haar) and the details ``D_l, ..., D_1``
    (``lro.wavelet``)::

        N   = Adam's direction from A                               [r, n]
        V   = sqrt(nu / (1 - b2^t)) + eps                           Adam's divisor
        E_j = D_j / V, every row of V repeated for the rows of D_j,
              limited to [-detail_clip, detail_clip]
        f   = min(1, growth_limit |N_before| / |N|)                 per matrix
        U   = f idwt(N, E_l, ..., E_1)                              [m, n]
        W <- W - lr (scale U + weight_decay W)

    State per matrix: ``2 r n`` numbers and one. Level 2 keeps a quarter of Adam's
    moments, level 3 an eighth; no basis is stored, found or refreshed, and the update
    has full rank. Leaves that are not transformed get Adam itself, unscaled.

    **Details have no bound of their own**: where neighbours nearly cancel, V is small
    and D is not; without warm-up a first step then moves single weights by more than
    100. So they are limited, by default to 1, the size of an element of N. On real text
    the loss was lower for it, too (``python -m benchmarks.detail_clip``).

    Other optimizers are hosted as ``base_optimizer``, and ``normalize`` says how the
    details follow them: the card has Adafactor, Adam-mini, Muon and Lion.

    Args:
      level: levels of the transform, a Python int; each halves the moments. 0 is Adam
        with a limiter.
      wavelet: "haar" (scripts) or "db2" to "db10". Longer filters overlap: their bands
        are a little longer, and the step takes more passes.
      axis: -2, the input axis of Flax kernels ``(in, out)`` (paper); -1, the input axis
        of torch's weights; "auto" the one that its sharding leaves whole, see
        ``lro.wavelet``. Kernels with more axes need ``layer_axis`` or
        ``weight_dimension_numbers``, as in ``lro.project``.
      detail_clip: largest magnitude of a detail after normalization, ``jnp.inf`` for no
        bound; None is 1, or no bound with ``conventions="authors"`` (code) and for raw
        details.
      growth_limit: largest ratio of one ``|N|`` to the one before it; None for no
        limit.
      normalize: True, False or "matrix", see ``lro.wavelet_details``.
      scale: factor on the whole update of a matrix.
      b2: decay of the second moment. The details are divided with it as well: a
        ``base_optimizer`` with another one needs it here, too.
      eps: added to the root, likewise; None is 1e-8, or 1e-6 with
        ``conventions="authors"`` (code).
      side: an error here: ``axis`` says it.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> sizes = lro.state_bytes(lro.gwt(learning_rate=1e-2, level=2), params).by_role
      >>> sizes["mu"] == sizes["nu"] == 4 * 64 * 32 // 4, sizes["recovery"]
      (True, 4)

    Differences from the authors' code:
      * Details are limited.
      * Those of ``lro.wavelet_details``; ``conventions="authors"`` takes the bias
        correction (on the whole update behind the bracket), eps and the order of decay
        from the code.
      * Adafactor's details are divided by its second moment; the code adds them raw
        (``normalize=False, growth_limit=None``). Of Adam-mini and Muon no code was
        released: those above follow the approximation's own rule.
      * Every matrix is selected by ``lro.project``'s rule; there, linear layers whose
        name contains attn or mlp.
    """
    its = Recipe(**options)
    eps = its.eps
    if eps is None:
        eps = 1e-6 if its.authors else 1e-8
    if detail_clip is None:
        detail_clip = None if its.authors or normalize is False else 1.0
    # A number that is traced cannot be asked, and stays a bound.
    elif isinstance(detail_clip, float) and math.isinf(detail_clip):
        detail_clip = None
    # Without b2 the details are divided by the raw root, as in the code. The correction
    # behind the bracket then multiplies the whole of the update.
    b2 = None if its.authors else its.b2
    tx = chain(
        # No basis is ever renewed, so this transport does nothing, in either mode.
        its.open(project_on(level, wavelet, axis), align_signs()),
        its.adam(),
        wavelet_details(eps, b2, growth_limit, detail_clip, normalize),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(its.correct(tx), learning_rate)


scale_by_gwt = direction(gwt)
