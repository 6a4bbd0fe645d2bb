"""GaLore with moments in eight bits."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import takes
from lowrank_optax.methods.galore import galore, scale_by_galore
from lowrank_optax.transforms import quantize_state


def _eight_bit(b1, b2, eps, block, min_size, conventions, options) -> dict[str, Any]:
    """Returns GaLore's options, with encoded moments inside."""
    authors = _recipe.is_authors(conventions)
    mu, nu = _recipe.eight_bit(block, authors)
    given = options.get("base_optimizer")
    inner = optax.scale_by_adam(b1, b2, eps) if given is None else given
    inner = quantize_state(inner, mu, nu, min_size, leafwise=given is None)
    return {**options, "base_optimizer": inner, "conventions": conventions}


@takes(scale_by_galore)
def scale_by_galore_8bit(
    rank: Any = 128,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    block: int = 256,
    min_size: int = 4096,
    basis_dtype: Any = jnp.bfloat16,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The direction of 8-bit GaLore, without learning rate and weight decay.

    Args:
      rank: see ``lro.galore_8bit``, like all others.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the corrected root.
      block: elements per scale.
      min_size: smaller matrices keep float32 moments.
      basis_dtype: storage dtype of the basis.
      conventions: "optax" or "authors".
      **options: as in ``lro.scale_by_galore``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.galore_8bit``.
      ValueError: as ``lro.galore_8bit``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_galore_8bit(rank=64)
      >>> tx.init({"kernel": jnp.ones((256, 128))}).inner_state.nu["kernel"].shape
      (64, 256)
    """
    options = _eight_bit(b1, b2, eps, block, min_size, conventions, options)
    return scale_by_galore(rank, basis_dtype=basis_dtype, **options)


@takes(galore)
def galore_8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    block: int = 256,
    min_size: int = 4096,
    basis_dtype: Any = jnp.bfloat16,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""8-bit GaLore: ``lro.galore`` with moments in eight bits, a bfloat16 basis.

    The update is GaLore's. The moments of a projected matrix, and of every full leaf,
    are stored as codes of bitsandbytes' dynamic maps with a float32 scale per block
    (``lro.quantize_state``)::

        state of an m x n matrix:  2 r n + 2 * 4 r ceil(n / block) + 2 m r   bytes
        (Adam in bfloat16:         4 m n)

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      b1: decay of the first moment (authors: 0.9).
      b2: decay of the second moment (authors: 0.999).
      eps: added to the corrected root (authors: 1e-8, here on the corrected one, too).
      block: elements per scale (256 in bitsandbytes today, 2048 in the paper).
      min_size: matrices with fewer moments keep them in float32 (authors: 4096).
      basis_dtype: storage dtype of the basis (authors: the gradient's, bfloat16).
      conventions: "optax", or "authors" for the SVD with its signs, blocks over the
        row-major order of the whole matrix, second moments that may vanish, and decay
        after the step.
      **options: as in ``lro.galore``; the moments of a ``base_optimizer`` in place of
        Adam are encoded likewise.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.galore``, or if ``block`` or ``min_size`` is no Python int.
      ValueError: as ``lro.galore``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> layer = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> used = lro.state_bytes(lro.galore_8bit(1e-2, rank=1024), layer)
      >>> used.by_role["mu"] == 1024 * 4096 + 4 * 1024 * 4096 // 256
      True

    References:
      Zhao et al., GaLore (2024), https://arxiv.org/abs/2403.03507
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021),
      https://arxiv.org/abs/2110.02861

    Differences from the authors' code:
      * Those of ``lro.galore`` and ``lro.quantize_state``.
      * The released class passes bitsandbytes' arguments by position, which in current
        versions stops matrices below ``min_size`` from moving at all.
    """
    options = _eight_bit(b1, b2, eps, block, min_size, conventions, options)
    return galore(learning_rate, rank, basis_dtype=basis_dtype, **options)
