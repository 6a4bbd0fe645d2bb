"""The trainer's layer-wise step against its plain one."""

import jax
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from examples.llama.batches import as_batch
from examples.llama.layerwise import make_layerwise_steps
from examples.llama.model import abstract_model, init_params
from examples.llama.step import make_steps, split_rows


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 264, n).tolist() for n in (17, 3, 17, 9)]
    return as_batch(rows, 4, 16)


def losses(steps, tx, config, batch):
    params = jax.tree.map(jax.numpy.array, init_params(config, 0))
    state, found = tx.init(params), []
    for _ in range(4):
        params, state, metrics = steps.train(params, state, split_rows(batch, 1))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(found)


def test_same_losses_as_the_plain_step(micro_config, batch):
    inner = lro.galore(1e-2, rank=8, update_proj_gap=3, layer_axis=0, eps=1e-4)
    guarded = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(0.5), inner), 5
    )
    plain = make_steps(abstract_model(micro_config)[0], guarded)
    ours = make_layerwise_steps(
        micro_config,
        inner,
        clip_norm=0.5,
        skip_nonfinite=True,
        wrap_layer=jax.checkpoint,
    )
    expected = losses(plain, guarded, micro_config, batch)
    # float32 sums in another order, through four steps and two refreshes.
    np.testing.assert_allclose(
        losses(ours, inner, micro_config, batch), expected, rtol=2e-5
    )


def test_refuses_micro_batches(micro_config, batch):
    tx = optax.adam(1e-2)
    steps = make_layerwise_steps(micro_config, tx)
    params = init_params(micro_config, 0)
    with pytest.raises(ValueError, match="one micro-batch"):
        steps.train(params, tx.init(params), split_rows(batch, 2))
