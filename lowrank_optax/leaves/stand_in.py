"""``hidden``: state that ``optax.tree_map_params`` must not take for the parameters'.

That function gives an init something in the parameters' place and takes every tree of
the state in which it comes back for one like the parameters, leaf by leaf. A basis, a
scale or a flag is kept for a parameter and is not like it: a partition spec that fits
the parameter does not fit them.
"""

from typing import Any

import jax.numpy as jnp
import optax


def _stand_in() -> type:
    """Returns the class of what stands in the parameters' place, by asking Optax."""
    seen: list[type] = []

    def init(params: Any) -> Any:
        seen.append(type(params))
        return ()

    optax.tree_utils.tree_map_params(init, lambda x: x, ())
    return seen[0]


_STAND_IN = _stand_in()


def hidden(params: Any, state: Any) -> Any:
    """Returns a part of a state, in the stand-in's place one leaf.

    One leaf, counted as no parameter's, stands for all that the part is.

    Args:
      params: what an init was given.
      state: what it keeps, no tree like ``params`` in shapes.
    """
    return jnp.bool_(False) if isinstance(params, _STAND_IN) else state
