"""Equinox: a module is the tree of parameters, and a file holds leaves.

Three lines to change:

    import lowrank_optax as lro
    tx = lro.galore(1e-2, rank=4)                   # was optax.adamw(1e-2)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

`eqx.nn.Linear` keeps weights as `[out, in]`. A projection has two sides and takes the
shorter one, so no dimension numbers are needed to be right; `lro.selection_report`
shows them, and a module of them is a tree like the model, not a function. Checkpoints:
`eqx.tree_serialise_leaves` of model and state, read into a fresh pair.

    python -m examples.clients.equinox_module
"""

import pathlib
from typing import Any

import equinox as eqx  # pyright: ignore[reportMissingImports]
import jax
import optax

import lowrank_optax as lro
from examples.clients import common

PROJECTED = ("up/weight", "down/weight")


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        vocabulary, width, hidden = common.VOCABULARY, common.WIDTH, common.HIDDEN
        self.embed = eqx.nn.Embedding(vocabulary, width, key=keys[0])
        self.up = eqx.nn.Linear(width, hidden, key=keys[1])
        self.down = eqx.nn.Linear(hidden, width, key=keys[2])
        self.head = eqx.nn.Linear(width, vocabulary, key=keys[3])

    def __call__(self, token: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.up(self.embed(token)))
        return self.head(self.down(x))


def make_step(tx: optax.GradientTransformation) -> Any:
    def loss_fn(model: Model, tokens: Any, after: Any) -> jax.Array:
        logits = jax.vmap(model)(tokens)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, after)
        return cross.mean()

    @eqx.filter_jit
    def train_step(model: Model, state: Any, tokens: Any, after: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, tokens, after)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    return train_step


def train(method: str, folder: pathlib.Path, steps: int) -> common.Run:
    """Trains to step `steps`, from the last file in `folder` if there is one."""
    model, tx = Model(jax.random.key(0)), common.optimizer(method)
    params = eqx.filter(model, eqx.is_inexact_array)
    report, state = lro.selection_report(tx, params), tx.init(params)

    folder.mkdir(parents=True, exist_ok=True)
    start = max((int(path.stem) for path in folder.glob("*.eqx")), default=0)
    if start:
        fresh = (model, state)
        model, state = eqx.tree_deserialise_leaves(folder / f"{start}.eqx", fresh)

    train_step, losses = make_step(tx), []
    for step in range(start, steps):
        model, state, loss = train_step(model, state, *common.batch(step))
        losses.append(float(loss))
    eqx.tree_serialise_leaves(folder / f"{steps}.eqx", (model, state))
    return common.Run(report, losses, eqx.filter((model, state), eqx.is_array))


if __name__ == "__main__":
    common.main(train)
