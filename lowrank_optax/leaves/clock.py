"""`next_count` counts steps in int32 without an end.

Optax' counters stop at 2^31 - 1, which is right for a bias correction and wrong for
what comes every so many steps: it would come never again, or at every step.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

_END = 2**31


def next_count(count: Any, period: int) -> Array:
    """Returns the count of the next step.

    The last period before 2^31 leads back by about 2^30 steps, a multiple of the
    period: the rhythm stays, and ``count`` plus less than a period has no overflow.

    Args:
      count: int32, the count of this step.
      period: Python int; what is done at its multiples goes on being done. From 2^30 on
        the counter stops at 2^31 - 1, as Optax' do.
    """
    if period >= _END // 2:
        return jnp.asarray(optax.safe_increment(count))
    back = _END // 2 // period * period
    return jnp.where(count < _END - period - 1, count + 1, count - (back - 1))
