"""Flax NNX: `nnx.Optimizer` on a model with sharding metadata, on four devices.

Three lines to change:

    import lowrank_optax as lro
    tx = lro.galore(1e-2, rank=4)                       # was optax.adamw(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

Dimension numbers: none for Linear and Embed, whose axes are concluded. Checkpoints:
`nnx.state(optimizer)` through Orbax. Meshes: under `jax.set_mesh` the state is laid out
by the parameters, Auto or Explicit; nothing is passed.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m examples.clients.nnx_optimizer
"""

import pathlib
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from examples.clients import common

PROJECTED = ("down/kernel", "up/kernel")


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs, normal = nnx.Rngs(0), nnx.initializers.normal()

        def cut(*axes: str | None) -> Any:
            return nnx.with_partitioning(normal, axes)

        vocabulary, width, hidden = common.VOCABULARY, common.WIDTH, common.HIDDEN
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, kernel_init=cut(None, "model"), rngs=rngs)
        self.down = nnx.Linear(hidden, width, kernel_init=cut("model", None), rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        rows, cut = laid_out("data", None), laid_out("data", "model")
        x = self.embed(tokens, out_sharding=rows)
        x = nnx.relu(self.up(x, out_sharding=cut))
        return self.head(self.down(x, out_sharding=rows), out_sharding=rows)


def laid_out(*axes: str | None) -> P | None:
    """An Explicit mesh is told how a product is laid out; an Auto one takes no word."""
    return P(*axes) if jax.sharding.get_abstract_mesh().explicit_axes else None


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, tokens: Any, after: Any) -> Any:
    def loss_fn(model: Model) -> jax.Array:
        logits = model(tokens)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, after)
        return cross.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def train(
    method: str, folder: pathlib.Path, steps: int, kind: AxisType = AxisType.Auto
) -> common.Run:
    """Trains to step `steps`, from the last checkpoint in `folder` if there is one."""
    mesh = common.four_devices(kind)
    with jax.set_mesh(mesh), ocp.CheckpointManager(folder.absolute()) as manager:
        model, tx = Model(), common.optimizer(method)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        report = lro.selection_report(tx, nnx.state(model, nnx.Param))

        state = nnx.state((model, optimizer))
        start = manager.latest_step() or 0
        if start:
            saved = manager.restore(start, args=ocp.args.StandardRestore(state))
            nnx.update((model, optimizer), saved)

        rows, losses = NamedSharding(mesh, P("data")), []
        for step in range(start, steps):
            inputs = jax.device_put(common.batch(step), rows)
            losses.append(float(train_step(model, optimizer, *inputs)))

        state = nnx.state((model, optimizer))
        manager.save(steps, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        return common.Run(report, losses, state)


if __name__ == "__main__":
    common.main(train, [{"kind": AxisType.Auto}, {"kind": AxisType.Explicit}])
