"""The default actions for the parts of a transformer."""

from collections.abc import Mapping
from typing import Any

from lowrank_optax import _checks
from lowrank_optax.activations.actions import Policy, parse_action

# role -> action.
TRANSFORMER_ACTIONS: Mapping[str, str] = {
    "residual": "int8",
    "norm": "recompute",
    "query_key": "int8",
    "value": "int4",
    "feed_forward": "int4",
    "activation": "recompute",
}

# tag -> role.
TRANSFORMER_TAGS: Mapping[str, str] = {
    "norm1": "norm",
    "q": "query_key",
    "k": "query_key",
    "v": "value",
    "attn": "value",
    "h": "residual",
    "norm2": "norm",
    "gate": "feed_forward",
    "up": "feed_forward",
    "act": "activation",
}


def transformer_policy(
    tags: Mapping[str, str] = TRANSFORMER_TAGS,
    *,
    group: Any = 128,
    stochastic: Any = False,
    **actions: Any,
) -> Policy:
    """Returns a policy for a transformer's block, by the roles of its tensors.

    What a matrix product made is kept in few bits, for computing it again costs a
    product; what norms and elementwise functions made is computed again, for that costs
    a pass over the memory:

    ============  ====================  =========  ==============================
    role          tags                  default    why
    ============  ====================  =========  ==============================
    query_key     q, k (rotated)        int8       they enter the softmax
    value         v, attn               int4       they enter linear maps
    feed_forward  gate, up              int4       the largest tensors
    residual      h                     int8       few bytes, and no product again
    norm          norm1, norm2          recompute  outliers: "int4+8" if kept
    activation    act                   recompute  elementwise, of gate and up
    ============  ====================  =========  ==============================

    Args:
      tags: tag -> role, for a model with tags of other names. Every tag whose action is
        not "recompute" must occur in the model.
      group: see ``Quantize``.
      stochastic: see ``Quantize``.
      **actions: role -> action, in place of the defaults.

    Raises:
      ValueError: if a role or an action is unknown.

    Examples:
      >>> from lowrank_optax import activations
      >>> print(activations.transformer_policy(residual="save", query_key="int4"))
      attn: int4, gate: int4, h: save, k: int4, q: int4, up: int4, v: int4
      >>> tags = {"mlp_in": "feed_forward", "ln": "norm"}
      >>> print(activations.transformer_policy(tags, norm="int4+8"))
      ln: int4+8, mlp_in: int4
    """
    for role in (*actions, *tags.values()):
        _checks.choice("role", role, TRANSFORMER_ACTIONS)
    chosen = {**TRANSFORMER_ACTIONS, **actions}
    found = {
        tag: parse_action(chosen[role], group, stochastic) for tag, role in tags.items()
    }
    return Policy({tag: action for tag, action in found.items() if action.keeps})
