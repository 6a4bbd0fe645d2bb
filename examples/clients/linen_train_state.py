"""Flax Linen: `TrainState`, saved as msgpack or by Orbax.

Three lines to change:

    import lowrank_optax as lro
    tx = lro.galore(1e-2, rank=4)                    # was optax.adamw(1e-2)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

Dimension numbers: none for Dense and Embed. Checkpoints: the whole `TrainState`, by
`flax.serialization.to_bytes` or by Orbax; moments in eight bits are plain arrays in
named tuples and pass through both.

    python -m examples.clients.linen_train_state
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import serialization
from flax.training.train_state import TrainState

import lowrank_optax as lro
from examples.clients import common

PROJECTED = ("down/kernel", "up/kernel")


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(common.VOCABULARY, common.WIDTH, name="embed")(tokens)
        x = nn.relu(nn.Dense(common.HIDDEN, name="up")(x))
        x = nn.Dense(common.WIDTH, name="down")(x)
        return nn.Dense(common.VOCABULARY, name="head")(x)


@jax.jit
def train_step(state: TrainState, tokens: Any, after: Any) -> Any:
    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, tokens)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, after)
        return cross.mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def save(state: TrainState, path: pathlib.Path, form: str) -> None:
    if form == "msgpack":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(serialization.to_bytes(state))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), state, force=True)


def load(fresh: TrainState, path: pathlib.Path, form: str) -> Any:
    if form == "msgpack":
        return serialization.from_bytes(fresh, path.read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), fresh)


def train(
    method: str, folder: pathlib.Path, steps: int, form: str = "msgpack"
) -> common.Run:
    """Trains to step `steps`, from the checkpoint in `folder` if there is one."""
    model, tx = Model(), common.optimizer(method)
    params = model.init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]
    report = lro.selection_report(tx, params)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    path = folder / "state"
    if path.exists():
        state = load(state, path, form)
    losses = []
    for step in range(int(state.step), steps):
        state, loss = train_step(state, *common.batch(step))
        losses.append(float(loss))
    save(state, path, form)
    return common.Run(report, losses, state)


if __name__ == "__main__":
    common.main(train, [{"form": "msgpack"}, {"form": "orbax"}])
