"""`optax.MultiSteps` around a method: gradients of two micro-batches make one step.

Three lines to change:

    import lowrank_optax as lro
    tx = lro.galore(1e-2, rank=4)                # was optax.adamw(1e-2)
    tx = optax.MultiSteps(tx, every_k_schedule=2)

The optimizer inside sees means of gradients only, and a basis counts its steps, not the
micro-batches. Dimension numbers, meshes: as without. Checkpoints: the state of
MultiSteps, with its accumulator, so that a stop between two micro-batches loses
nothing; the three steps before the restart here are one and a half.

    python -m examples.clients.multi_steps
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import lowrank_optax as lro
from examples.clients import common
from examples.clients.linen_train_state import Model

PROJECTED = ("down/kernel", "up/kernel")


def make_step(apply: Callable[..., Any], tx: optax.MultiSteps) -> Any:
    def loss_fn(params: Any, tokens: Any, after: Any) -> jax.Array:
        logits = apply({"params": params}, tokens)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, after)
        return cross.mean()

    @jax.jit
    def train_step(params: Any, state: Any, tokens: Any, after: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, after)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


def train(method: str, folder: pathlib.Path, steps: int) -> common.Run:
    """Takes micro-batches up to `steps`, from where `folder` says if it does."""
    model, inner = Model(), common.optimizer(method)
    params = model.init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    report, state = lro.selection_report(inner, params), tx.init(params)

    with ocp.CheckpointManager(folder.absolute()) as manager:
        start = manager.latest_step() or 0
        if start:
            args = ocp.args.StandardRestore((params, state))
            params, state = manager.restore(start, args=args)

        train_step, losses = make_step(model.apply, tx), []
        for step in range(start, steps):
            params, state, loss = train_step(params, state, *common.batch(step))
            losses.append(float(loss))

        manager.save(steps, args=ocp.args.StandardSave((params, state)))
        manager.wait_until_finished()
    return common.Run(report, losses, (params, state))


if __name__ == "__main__":
    common.main(train)
