"""Which steps a run takes: plain ones, `--layerwise` ones or `--compressed` ones."""

from typing import Any

import jax
import optax

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.activations import Wrap
from examples.llama.compressed import make_compressed_steps
from examples.llama.config import SENDS, Resolved, UsageError
from examples.llama.layerwise import make_layerwise_steps
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.step import Layout, Steps, abstract_batch, make_steps
from examples.llama.weights import Weights


def choose_steps(
    config: Resolved,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    weights: Weights,
    layout: Layout,
    wrap_layer: Wrap | None = None,
) -> Steps:
    """The steps that the flags ask for, all with the state of `optimizers.guarded`.

    Raises:
        UsageError: the optimizer cannot be stepped so; nothing is computed yet.
    """
    on_mesh = layout if layout.mesh else None
    definition, params = abstract_model(model)
    tx = optimizers.guarded(config, optimizer)
    if config.layerwise:
        steps = make_layerwise_steps(
            model,
            optimizer,
            clip_norm=config.clip or None,
            skip_nonfinite=True,
            wrap_layer=wrap_layer,
            layout=layout,
        )
        _trace(steps, config, params, jax.eval_shape(tx.init, params))
        return steps
    if config.compressed:
        traffic(config, optimizer, params)
        assert layout.mesh is not None  # choose_placement has seen to it
        parts = config.micro_batches
        return make_compressed_steps(
            definition, tx, layout.mesh, parts, weights, wrap_layer, on_mesh
        )
    return make_steps(definition, tx, weights, wrap_layer, on_mesh)


def _trace(steps: Steps, config: Resolved, params: Any, state: Any) -> None:
    """The step refuses an optimizer while it is traced."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        jax.eval_shape(steps.train, params, state, abstract_batch(config), key)
    except ValueError as error:
        raise UsageError(f"--layerwise with {config.optimizer}: {error}") from error


def traffic(
    config: Resolved, optimizer: optax.GradientTransformation, params: Any
) -> lro.distributed.TrafficReport:
    """What `--compressed` sends of every gradient.

    Raises:
        UsageError: no projection is ever sent.
    """
    sending = ", ".join(name for name in SENDS if name != config.optimizer)
    others = f"methods that send projections: {sending}"
    try:
        report = lro.distributed.traffic_report(optimizer, params)
    except ValueError as error:  # no bracket
        raise UsageError(
            f"--compressed: {config.optimizer} projects nothing; {others}"
        ) from error
    if not report.compressed:
        row = next(row for row in report.rows if len(row.shape) == 3)
        raise UsageError(
            f"--compressed: {config.optimizer} sends every gradient whole "
            f"({row.path}: {row.reason}); {others}"
        )
    return report
