"""The trainer's layer-wise step against its plain one."""

import dataclasses

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


def test_packed_rows_of_a_tied_model(micro_config):
    """The head's part of the embedding's gradient, and documents kept apart."""
    config = dataclasses.replace(micro_config, tied=True, vocab_size=40, kv_heads=1)
    draw, shape = np.random.default_rng(0), (2, 2, 12)
    documents = [[5, 4, 3], [12, 0, 0], [4, 4, 4], [6, 6, 0]]  # their lengths, by row
    batch = {
        "tokens": draw.integers(0, 40, shape, np.int32),
        "targets": draw.integers(0, 40, shape, np.int32),
        "mask": draw.integers(0, 2, shape).astype(np.float32),
        "segments": np.stack(
            [np.repeat(np.int32([1, 2, 3]), row) for row in documents]
        ).reshape(shape),
    }
    tx = optax.sgd(0.5)
    guarded = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), tx), 5)
    found = []
    for steps, state_of in (
        (make_steps(abstract_model(config)[0], guarded), guarded),
        (make_layerwise_steps(config, tx, clip_norm=1.0), tx),
    ):
        params = jax.tree.map(jax.numpy.array, init_params(config, 0))
        params, _, metrics = steps.train(params, state_of.init(params), batch)
        found.append((params, metrics["loss"], metrics["grad_norm"]))
    assert found[0][2] > 1
    # float32 sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found
    )
