"""Tunix: `PeftTrainer`, which takes any Optax transformation, with and without a mesh.

Three lines to change:

    import lowrank_optax as lro
    tx = lro.galore(1e-2, rank=4)                       # was optax.adamw(1e-2)
    trainer = PeftTrainer(model, tx, config)

Dimension numbers: none for Linear and Embed; for kernels of more axes see the page on
clients. Checkpoints: Tunix' own, parameters and state. Meshes: `with mesh:`, as Tunix
reads it; the state is laid out by the model's metadata. A model with LoRA is trained on
its factors alone, whose shorter side is the rank of LoRA: they are projected only if
`rank` is smaller than that.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m examples.clients.tunix_peft
"""

import contextlib
import pathlib
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType
from tunix.sft.peft_trainer import (  # pyright: ignore[reportMissingImports]
    PeftTrainer,
    TrainingConfig,
)

import lowrank_optax as lro
from examples.clients import common
from examples.clients.nnx_optimizer import Model

PROJECTED = ("down/kernel", "up/kernel")


def loss_fn(model: Model, tokens: Any, after: Any) -> jax.Array:
    cross = optax.softmax_cross_entropy_with_integer_labels(model(tokens), after)
    return cross.mean()


def placed(model: Model) -> None:
    """Lays the parameters out on the mesh in use, as Tunix' guides do."""
    state = nnx.state(model)
    specs = nnx.get_partition_spec(state)
    nnx.update(model, jax.lax.with_sharding_constraint(state, specs))


def train(
    method: str, folder: pathlib.Path, steps: int, sharded: bool = False
) -> common.Run:
    """Trains to step `steps`, from the last checkpoint in `folder` if there is one."""
    mesh = common.four_devices(AxisType.Auto)
    # Flax would place annotated parameters at once, which Tunix does afterwards.
    with nnx.use_eager_sharding(False), mesh if sharded else contextlib.nullcontext():
        model, tx = Model(), common.optimizer(method)
        if sharded:
            placed(model)
        report = lro.selection_report(tx, nnx.state(model, nnx.Param))
        config = TrainingConfig(
            eval_every_n_steps=1000,
            max_steps=steps,
            checkpoint_root_directory=str(folder.absolute()),
            checkpointing_options=ocp.CheckpointManagerOptions(),
            data_sharding_axis=("data",),
        )
        trainer = PeftTrainer(model, tx, config).with_loss_fn(loss_fn)
        # The trainer passes over the batches of the steps that it has taken.
        names = ("tokens", "after")
        batches = [dict(zip(names, common.batch(i), strict=True)) for i in range(steps)]
        trainer.train(batches)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    state = nnx.state((trainer.model, trainer.optimizer))
    return common.Run(report, [float(x) for x in losses], state)


if __name__ == "__main__":
    common.main(train, [{"sharded": False}, {"sharded": True}])
