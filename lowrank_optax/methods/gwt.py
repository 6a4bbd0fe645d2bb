"""GWT: Adam on the wavelet approximation of the gradient, details without state."""

import math
from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import (
    ProjectOptions,
    takes,
    takes_project_options,
)
from lowrank_optax.projectors import wavelet as project_on
from lowrank_optax.recovery import wavelet_details


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    level: int,
    *,
    wavelet: str = "haar",
    axis: int | str = -2,
    scale: float | Array = 0.25,
    detail_clip: float | Array | None = None,
    growth_limit: float | Array | None = 1.01,
    normalize: bool | str = True,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    base_optimizer: optax.GradientTransformation | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    if eps is None:
        eps = 1e-6 if authors else 1e-8
    details = wavelet_details(
        eps,
        None if authors else b2,
        growth_limit,
        _bound(detail_clip, authors or normalize is False),
        normalize,
    )
    tx = chain(
        project(project_on(level, wavelet, axis), **options),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors),
        details,
        backproject(scale, learning_rate),
    )
    return _recipe.correct_bias(tx, base_optimizer, b1, b2, authors)


def _bound(detail_clip: Any, free: bool) -> Any:
    if detail_clip is None:
        return None if free else 1.0
    unbounded = isinstance(detail_clip, float) and math.isinf(detail_clip)
    return None if unbounded else detail_clip


@takes(_bracket)
def scale_by_gwt(
    level: int = 2, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of GWT, without learning rate and weight decay.

    Args:
      level: see ``lro.gwt``, like all others.
      **options: as in ``lro.gwt``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.gwt``.
      ValueError: as ``lro.gwt``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_gwt(level=2), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].inner_state.nu["kernel"].shape
      (16, 32)
    """
    return _bracket(None, level, **options)


@takes(_bracket)
def gwt(
    learning_rate: optax.ScalarOrSchedule,
    level: int = 2,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GWT: Adam on the wavelet approximation of the gradient, details without state.

    For a matrix ``W [m, n]`` with gradient ``G`` and its wavelet bands along m, ``A``
    with ``r = ceil(m / 2^level)`` rows (Haar) and the details ``D_l, ..., D_1``
    (``lro.wavelet``)::

        mu = b1 mu + (1 - b1) A                                     [r, n]
        nu = b2 nu + (1 - b2) A^2
        V  = sqrt(nu / (1 - b2^t)) + eps
        N  = (mu / (1 - b1^t)) / V
        E_j = D_j / V, every row of V repeated for the rows of D_j,
              limited to [-detail_clip, detail_clip]
        f  = min(1, growth_limit |N_before| / |N|)                  per matrix
        U  = f idwt(N, E_l, ..., E_1)                               [m, n]
        W <- W - lr (scale U + weight_decay W)

    State per matrix: ``2 r n`` numbers and one. Level 2 keeps a quarter of Adam's
    moments, level 3 an eighth; no basis is stored, found or refreshed, every step costs
    the same few passes over the gradient, and the update has full rank. Leaves that are
    not transformed get Adam itself, unscaled.

    **Details have no bound of their own**: where neighbours nearly cancel, V is small
    and D is not; without warm-up a first step then moves single weights by more than
    100. So they are limited, by default to 1, the size of an element of N. On real text
    the loss was lower for it, too (``python -m benchmarks.detail_clip``).

    Other optimizers are hosted as ``base_optimizer``, and ``normalize`` says how the
    details follow them (``lro.wavelet_details``; ``full`` keeps Adam on the leaves
    that are no matrices)::

        Adafactor   optax.chain(lro.scale_by_matrix_factored_rms(),
                                lro.clip_by_matrix_rms())
        Adam-mini   lro.scale_by_adam_mini(b1, b2, eps), full=optax.scale_by_adam()
        Muon        optax.chain(optax.trace(0.95, nesterov=True),
                                lro.orthogonalize("newton_schulz")),
                    normalize="matrix", full=optax.scale_by_adam()
        Lion        optax.scale_by_lion(), normalize="matrix"

    Args:
      learning_rate: a number or an Optax schedule (0.01 in the scripts from 60M to 1B).
      level: levels of the transform (2 in the scripts); each halves the moments. 0 is
        Adam with a limiter.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      wavelet: "haar" (scripts) or "db2" to "db10". Longer filters overlap: their bands
        are a little longer, and the step takes more passes.
      axis: -2, the input axis of Flax kernels ``(in, out)`` (paper); -1, the input axis
        of torch's weights; "auto" the one that its sharding leaves whole, see
        ``lro.wavelet``. Kernels with more axes need ``layer_axis`` or
        ``weight_dimension_numbers``, as in ``lro.project``.
      scale: factor on the whole update of a matrix (scripts: 0.25).
      detail_clip: largest magnitude of a detail after normalization, ``jnp.inf`` for no
        bound; None is 1, or no bound with ``conventions="authors"`` (code) and for raw
        details.
      growth_limit: largest ratio of one ``|N|`` to the one before it (code: 1.01); None
        for no limit.
      normalize: True, False or "matrix", see ``lro.wavelet_details``.
      b1: decay of the first moment (scripts: 0.9).
      b2: decay of the second moment (scripts: 0.999). The details are divided with it
        as well: a ``base_optimizer`` with another one needs it here, too.
      eps: added to the root, likewise; None is 1e-8, or 1e-6 with
        ``conventions="authors"`` (code).
      base_optimizer: the inner transformation in place of Adam.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      conventions: "optax", or "authors" for the released code: no bias correction
        inside, but on the whole update behind the bracket, and decay after the step.
      **options: the arguments above that the signature lists after ``mask``, and those
        of ``lro.project`` (``select``, ``layer_axis``, ``full``, ...; not ``side``).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``level`` is not a Python int, or an argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, if a leaf
        selected explicitly is no matrix, or ``side`` is given; at update, if the inner
        optimizer has no second moment and ``normalize=True``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.gwt(learning_rate=1e-2, level=2)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> sizes = lro.state_bytes(tx, params).by_role
      >>> sizes["mu"] == sizes["nu"] == 4 * 64 * 32 // 4, sizes["recovery"]
      (True, 4)

    References:
      GWT: Scalable Optimizer State Compression for Large Language Model Training
      (2025), https://arxiv.org/abs/2501.07237

    Differences from the authors' code:
      * Details are limited.
      * Those of ``lro.wavelet_details``; ``conventions="authors"`` takes the bias
        correction, eps and the order of decay from the code.
      * Moments are float32 whatever the gradient's dtype.
      * Adafactor's details are divided by its second moment; the code adds them raw
        (``normalize=False, growth_limit=None``). Of Adam-mini and Muon no code was
        released: those above follow the approximation's own rule.
      * Every matrix is selected by ``lro.project``'s rule; there, linear layers whose
        name contains attn or mlp.
    """
    tx = _bracket(learning_rate, level, **options)
    conventions = options.get("conventions", "optax")
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
