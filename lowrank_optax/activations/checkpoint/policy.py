"""``Policy``: an action for every tag, and the default one for a transformer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_optax import _checks
from lowrank_optax.activations.checkpoint.actions import Action, parse_action


@dataclasses.dataclass(frozen=True, init=False)
class Policy(Mapping[str, Action]):
    """An action per tag: a Mapping that can be hashed, so that plans can be cached.

    Args:
      actions: tag -> action or a string that names one, see ``parse_action``. A tag
        that is not listed is recomputed, like everything that has none.
      group: of the actions that are given as strings, see ``Quantize``.
      stochastic: likewise.

    Raises:
      TypeError: if ``actions`` is no mapping of strings.
      ValueError: if a string names no action.

    Examples:
      >>> from lowrank_optax import activations
      >>> policy = activations.Policy({"q": "int8", "gate": "int4"}, group=64)
      >>> print(policy)
      gate: int4 group 64, q: int8 group 64
      >>> policy == activations.Policy(dict(policy))
      True
    """

    entries: tuple[tuple[str, Action], ...]

    def __init__(self, actions: Any = (), group: Any = 128, stochastic: Any = False):
        """Parses and sorts the actions."""
        actions = actions if actions != () else {}
        if not isinstance(actions, Mapping) or any(
            not isinstance(tag, str) for tag in actions
        ):
            raise TypeError(
                "A policy must map tags to actions, for example {'gate': 'int4', 'q': "
                f"'int8'}}; got {actions!r}."
            )
        found = {
            tag: parse_action(action, group, stochastic)
            for tag, action in actions.items()
        }
        # Sorted, so that equal policies hash alike in whatever order they were written.
        object.__setattr__(self, "entries", tuple(sorted(found.items())))

    def __getitem__(self, tag: str) -> Action:
        """Returns the action of a listed tag."""
        return dict(self.entries)[tag]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the listed tags, sorted."""
        return (tag for tag, _ in self.entries)

    def __len__(self) -> int:
        """Returns how many tags are listed."""
        return len(self.entries)

    def kept(self, tag: str) -> Action | None:
        """Returns the action of a tag of which something is kept, else None."""
        action = self.get(tag)
        return action if action is not None and action.keeps else None

    def __str__(self) -> str:
        """Returns "tag: action, ..."."""
        return ", ".join(f"{tag}: {action}" for tag, action in self.entries)


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

    Results of matrix products are kept in few bits, because computing them again costs
    a product; results of norms and elementwise functions are computed again, which
    costs a pass over the memory:

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
