"""SCALE's cases: recorded on torch's weights, whose columns are our rows."""

from collections.abc import Callable
from typing import Any

import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within

# At most 7.9e-7 was measured, in the vector; the parameters travel 0.08 to 0.10.
_TOLERANCE = within(1e-5)

_ROLES = {"embedding": "table", "main": "kernel", "last": "head", "adamw": "vector"}


def scale(case: Case) -> Replay:
    """SCALE, as released; the embedding alone lies as it does here."""
    config = case.config
    roles = {name: _ROLES[_word(said)] for name, said in config["roles"].items()}
    if sorted(roles) != sorted(case.names):
        raise ValueError(f"The roles and the arrays name other parameters: {roles}")
    orders = config["adam_eps_place"], config["weight_decay_order"]
    # On a root whose bias is not corrected yet, eps is 3e-7 of it.
    if orders != ("raw sqrt(v)", "before update"):
        raise ValueError(f"Another place of eps, or of the decay: {orders}")
    (head,) = (name for name, role in roles.items() if role == "head")
    (b1, b2), decay = config["adam_b"], config["weight_decay"]
    rate, vector_rate = config["learning_rate"], config["adam_lr"]
    vectors = {name: role == "vector" for name, role in roles.items()}
    tx = lro.column_sgd(
        rate,
        momentum=config["momentum"],
        head=head,
        vector_scale=vector_rate / rate,
        b1=b1,
        b2=b2,
        eps=config["adam_eps"],
        weight_decay=decay,
        mask={name: not is_vector for name, is_vector in vectors.items()},
    )
    # There, the decay of a vector takes the vector's learning rate.
    decayed = optax.masked(optax.add_decayed_weights(-vector_rate * decay), vectors)
    kernels = {name for name, role in roles.items() if role in ("kernel", "head")}

    def turned(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: x.T if name in kernels else x for name, x in tree.items()}

    # The head's momentum was recorded under another name; its weights follow from it.
    return Replay(
        _between(turned, optax.chain(tx, decayed)), _TOLERANCE, lambda _: {}, _TOLERANCE
    )


def _word(said: str) -> str:
    return said.replace(":", " ").split()[0]


def _between(turned: Callable, tx: Any) -> optax.GradientTransformation:
    """Runs ``tx`` on trees of another orientation."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = tx.update(turned(updates), state, turned(params))
        return turned(updates), state

    return optax.GradientTransformation(lambda params: tx.init(turned(params)), update)
