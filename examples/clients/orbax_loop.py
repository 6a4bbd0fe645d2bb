"""A loop of one's own with Orbax, on four devices: every sharding is said.

Three lines to change:

    import lowrank_optax as lro
    tx = lro.galore(1e-2, rank=4)                        # was optax.adamw(1e-2)
    layout = lro.state_shardings(tx, params, shardings)  # for init and restore

Dimension numbers: none for matrices in a plain tree. Checkpoints: parameters and state
in one tree; the target of a restore is a tree of shapes with shardings, so that nothing
is allocated twice. Meshes: Auto or Explicit. Without the layout `jax.jit(tx.init)` puts
the whole state on one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m examples.clients.orbax_loop
"""

import pathlib
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from examples.clients import common

PROJECTED = ("down/kernel", "up/kernel")

SHAPES = {
    "embed": {"embedding": (common.VOCABULARY, common.WIDTH)},
    "up": {"kernel": (common.WIDTH, common.HIDDEN), "bias": (common.HIDDEN,)},
    "down": {"kernel": (common.HIDDEN, common.WIDTH), "bias": (common.WIDTH,)},
    "head": {"kernel": (common.WIDTH, common.VOCABULARY)},
}
SPECS = {
    "embed": {"embedding": P()},
    "up": {"kernel": P(None, "model"), "bias": P("model")},
    "down": {"kernel": P("model", None), "bias": P()},
    "head": {"kernel": P()},
}


def initial(key: jax.Array) -> Any:
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(shapes))
    normal = jax.nn.initializers.normal(0.1)
    return tree.unflatten(normal(k, s) for k, s in zip(keys, shapes, strict=True))


def loss_fn(params: Any, tokens: Any, after: Any, rows: P | None) -> jax.Array:
    x = params["embed"]["embedding"].at[tokens].get(out_sharding=rows)
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    # A sum over a cut axis: an Explicit mesh wants to know how its result is laid out.
    x = jax.numpy.dot(x, params["down"]["kernel"], out_sharding=rows)
    logits = (x + params["down"]["bias"]) @ params["head"]["kernel"]
    cross = optax.softmax_cross_entropy_with_integer_labels(logits, after)
    return cross.mean()


def train(
    method: str, folder: pathlib.Path, steps: int, kind: AxisType = AxisType.Auto
) -> common.Run:
    """Trains to step `steps`, from the last checkpoint in `folder` if there is one."""
    tx, mesh = common.optimizer(method), common.four_devices(kind)
    rows = P("data", None) if kind is AxisType.Explicit else None

    @jax.jit
    def train_step(params: Any, state: Any, tokens: Any, after: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, after, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    with jax.set_mesh(mesh), ocp.CheckpointManager(folder.absolute()) as manager:
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
        params = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
        report = lro.selection_report(tx, params)
        layout = lro.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=layout)(params)

        start = manager.latest_step() or 0
        if start:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            args = ocp.args.StandardRestore(target)
            params, state = manager.restore(start, args=args)

        losses, data = [], NamedSharding(mesh, P("data"))
        for step in range(start, steps):
            inputs = jax.device_put(common.batch(step), data)
            params, state, loss = train_step(params, state, *inputs)
            losses.append(float(loss))

        manager.save(steps, args=ocp.args.StandardSave((params, state)))
        manager.wait_until_finished()
    return common.Run(report, losses, (params, state))


if __name__ == "__main__":
    common.main(train, [{"kind": AxisType.Auto}, {"kind": AxisType.Explicit}])
