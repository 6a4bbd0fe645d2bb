"""``galore``: Adam, Adafactor, or Adam in eight bits, in the gradient's subspace."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method, recipe_of
from lowrank_optax.methods._shared import Options, Recipe, Transformation
from lowrank_optax.projectors import Projector, power, svd
from lowrank_optax.transforms import (
    clip_by_matrix_rms,
    quantize_state,
    scale_by_matrix_factored_rms,
    scale_by_parameter_rms,
)


class _Adafactor(has.Base, has.Bases, has.Conventions): ...


class _Encoded(has.Encoded, has.Stored): ...


@method("GaLore", "2403.03507", "Zhao et al. (2024)")
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    **options: Unpack[Options],
) -> Transformation:
    """GaLore: Adam on the gradient's leading singular subspace.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G``, every
    ``update_proj_gap`` steps ``P [m, r]`` becomes the leading left singular basis of
    ``G``; each step t = 1, 2, ... is::

        R  = P^T G                                     [r, n]
        mu = b1 mu + (1 - b1) R
        nu = b2 nu + (1 - b2) R^2
        N  = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
        W <- W - lr (scale * P N + weight_decay * W)

    Moments take ``2 r n`` elements in place of ``2 m n``, the basis ``m r``. Leaves
    that are not projected get Adam itself.

    Examples:
      >>> import jax.numpy as jnp, optax, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> tx = lro.galore(learning_rate=1e-2, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> optax.tree_utils.tree_get(state, "mu")["kernel"].shape
      (4, 64)

    Differences from the authors' code:
      * The default basis comes from block power steps, not from an SVD.
      * New basis vectors keep the old ones' signs; there, a sign that flips at a
        refresh turns that vector's momentum around.
      * ``eps`` stands on the bias-corrected root, and decay uses the weights before
        the step. ``conventions="authors"`` restores both, the SVD and its signs.
      * Moments and basis are float32 whatever the gradient's dtype.
      * A zero or non-finite gradient never reaches a basis; the refresh is made up
        for at the next step.
      * A square matrix is projected on its input axis (a torch weight's right side,
        a Flax kernel's left).
    """
    its = Recipe(**options)
    # Nothing limits the direction, so its bias is corrected inside, where it is small.
    tx = chain(
        its.open(leading(its, rank)),
        its.corrected_adam(),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_galore = direction(galore)


def leading(its: Recipe, rank: Any) -> Projector:
    """Returns GaLore's projector: the gradient's leading singular basis."""
    return its.bases(svd if its.authors else power, rank, its.update_proj_gap)


@method(
    "8-bit GaLore",
    "2403.03507",
    "Zhao et al. (2024)",
    defaults={"eps": 1e-8, "basis_dtype": jnp.bfloat16},
)
def galore_8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    block: int = 256,
    min_size: int = 4096,
    **options: Unpack[_Encoded],
) -> Transformation:
    """8-bit GaLore: ``lro.galore`` with moments in eight bits, a bfloat16 basis.

    The update is GaLore's. The moments of a projected matrix, and of every full leaf,
    are stored as codes of bitsandbytes' dynamic maps with a float32 scale per block
    (``lro.quantize_state``)::

        state of an m x n matrix:  2 r n + 2 * 4 r ceil(n / block) + 2 m r   bytes
        (Adam in bfloat16:         4 m n)

    Args:
      block: elements per scale (256 in bitsandbytes today, 2048 in the paper).
      base_optimizer: the inner transformation in place of Adam, encoded likewise.

    Examples:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> used = lro.state_bytes(lro.galore_8bit(1e-2, rank=1024), layer)
      >>> used.by_role["mu"] == 1024 * 4096 + 4 * 1024 * 4096 // 256
      True

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021),
      https://arxiv.org/abs/2110.02861

    Differences from the authors' code:
      * Those of ``lro.galore`` and ``lro.quantize_state``.
      * The released class passes bitsandbytes' arguments by position, which in current
        versions stops matrices below ``min_size`` from moving at all.
      * ``conventions="authors"`` has the SVD with its signs, blocks over the row-major
        order of the whole matrix, second moments that may vanish, and decay after the
        step.
    """
    its = Recipe(**options)
    mu, nu = has.eight_bits(block, its.authors)
    inner: Any = its.base_optimizer
    if inner is None:
        # Optax' Adam in both modes: the released 8-bit code, too, adds eps to the
        # corrected root.
        inner = made(optax.scale_by_adam, its.b1, its.b2, its.eps)
    # Adam treats every leaf by itself, so only one is decoded at a time.
    alone = its.base_optimizer is None
    inner = made(quantize_state, inner, mu, nu, min_size, leafwise=alone)
    # GaLore's recipe corrects no bias of an optimizer that it is given.
    options["base_optimizer"] = inner
    return recipe_of(galore)(learning_rate, rank, **options)


scale_by_galore_8bit = direction(galore_8bit)


@method(
    "GaLore with Adafactor",
    "1804.04235",
    "Shazeer and Stern, Adafactor (2018)",
    ignored=("min_parameter_scale without multiply_by_parameter_scale",),
)
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule | None = None,
    rank: Any = 128,
    *,
    decay_rate: float | Array = 0.8,
    eps: float | Array = 1e-30,
    clipping_threshold: float | Array = 1.0,
    momentum: float | Array | None = 0.9,
    multiply_by_parameter_scale: bool = False,
    min_parameter_scale: float | Array = 1e-3,
    **options: Unpack[_Adafactor],
) -> Transformation:
    """GaLore on Adafactor: moments of ``r + n`` numbers per matrix, and the basis.

    With ``R = P^T G`` (see ``lro.galore``), ``S = R^2 + eps`` and
    ``b = 1 - t^(-decay_rate)``::

        row = b row + (1 - b) mean_n(S)     col = b col + (1 - b) mean_r(S)
        U  = R / sqrt(row / mean(row)) / sqrt(col)
        U  = lr * U / max(1, rms(U) / clipping_threshold)
        mu = momentum mu + (1 - momentum) U;   U = mu          (if momentum)
        W <- W - lr weight_decay W - scale * P U

    Args:
      learning_rate: a number or a schedule; None is Adafactor's relative step,
        ``min(0.01, 1 / sqrt(t))``.
      decay_rate: exponent of the second moment's decay.
      eps: added to the squared gradient.
      clipping_threshold: largest rms of the low-rank update.
      momentum: decay of the first moment of the scaled updates; None has none.
        Adafactor without momentum keeps less than a basis takes, so the default
        selection then leaves every leaf full: say ``select`` to project anyway.
      multiply_by_parameter_scale: multiply by ``max(min_parameter_scale, rms(W))``
        of the full parameter (the update then needs ``params``).
      min_parameter_scale: smallest such factor.

    References:
      Zhao et al. (2024), https://arxiv.org/abs/2403.03507

    Differences from the authors' code:
      * The default basis comes from block power steps and keeps its signs;
        ``conventions="authors"`` restores the SVD.
      * Every matrix of a stack has its own factors and its own clipping.
    """
    its = Recipe(**options)
    rate: Any = _relative_step if learning_rate is None else learning_rate
    inner = [
        made(scale_by_matrix_factored_rms, decay_rate, eps),
        made(clip_by_matrix_rms, clipping_threshold),
    ]
    if multiply_by_parameter_scale:
        inner.append(made(scale_by_parameter_rms, min_parameter_scale))
    # Inside the bracket, in front of the momentum: Adafactor averages updates that its
    # rate has multiplied already. With ``match`` their length says nothing.
    inside = its.match is None
    if inside:
        inner.append(made(optax.scale_by_learning_rate, rate))
    if momentum is not None:
        inner.append(made(optax.ema, momentum, debias=False))
    last = backproject(its.scale, None if inside else rate)
    tx = chain(its.open(leading(its, rank)), *inner, last)
    return its.decayed(tx, rate, authors=False)


def _relative_step(count: Array) -> Array:
    # Optax counts steps from 0, the paper from 1.
    return jnp.minimum(1e-2, 1.0 / jnp.sqrt(count.astype(jnp.float32) + 1.0))
