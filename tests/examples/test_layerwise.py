"""The trainer's layer-wise step against its plain one."""

import jax
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from examples.llama.batches import as_batch
from examples.llama.choose_steps import make_layerwise_steps
from examples.llama.model import abstract_model, init_params
from examples.llama.step import make_steps, split_rows


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 264, n).tolist() for n in (17, 3, 17, 9)]
    return as_batch(rows, 4, 16)


def trained(steps, tx, config, batch, micro_batches):
    params = jax.tree.map(jax.numpy.array, init_params(config, 0))
    state, found = tx.init(params), []
    for _ in range(4):
        cut = split_rows(batch, micro_batches)
        params, state, metrics = steps.train(params, state, cut)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(found), params, state, metrics


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
    expected = trained(plain, guarded, micro_config, batch, 1)
    found = trained(ours, guarded, micro_config, batch, 1)
    # float32 sums in another order, 2e-7 through four steps and two refreshes.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert jax.tree.structure(found[1:]) == jax.tree.structure(expected[1:])
    poisoned = jax.tree.map(lambda x: x * np.nan, found[1])
    for expect in (1, 2):
        poisoned, state, metrics = ours.train(poisoned, found[2], split_rows(batch, 1))
        found = (*found[:2], state)
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == expect
