"""Steps that send projections: the losses of the plain steps."""

import jax
import numpy as np
import optax

import lowrank_optax as lro
from examples.llama.batches import as_batch
from examples.llama.choose_steps import make_compressed_steps
from examples.llama.model import abstract_model, init_params
from examples.llama.placement import make_mesh, parse_mesh
from examples.llama.step import make_steps, split_rows


def test_losses_equal_those_of_the_plain_steps(micro_config):
    """Two micro-batches on two devices; refreshes at steps 0 and 2 of 4.

    Not clipped, as the norm to clip by is another one. Rounding of 1e-7 in a gradient
    is up to ten times that in an update of Adam's, here of 1e-2.
    """
    bracket = lro.galore(1e-2, projector=lro.svd(8, 2), layer_axis=0, eps=1e-3)
    tx = optax.apply_if_finite(bracket, 10)
    definition, _ = abstract_model(micro_config)
    micro_batches, mesh = 2, make_mesh(parse_mesh("data=2", 2), jax.devices()[:2])
    ways = [
        make_steps(definition, tx),
        make_compressed_steps(definition, tx, mesh, micro_batches),
    ]
    draw = np.random.default_rng(0)
    batches = [
        as_batch([draw.integers(0, 264, n).tolist() for n in (17, 3, 9, 17)], 4, 16)
        for _ in range(4)
    ]
    losses = []
    for steps in ways:
        params = init_params(micro_config, 0)
        state, found = jax.jit(tx.init)(params), []
        for batch in batches:
            micro = split_rows(batch, micro_batches)
            params, state, metrics = steps.train(params, state, micro)
            assert int(metrics["tokens"]) == batch["mask"].sum()
            found.append(float(metrics["loss"]))
        losses.append(found)
        assert int(state.total_notfinite) == 0
        assert jax.tree.all(jax.tree.map(lambda x: x.is_fully_replicated, state))
    assert losses[0][-1] != losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
