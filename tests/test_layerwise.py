"""Layer-wise steps against the plain step, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

LAYERS, WIDTH, VOCAB = 3, 16, 24


def make_params(layers=LAYERS, width=WIDTH):
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": {"table": jax.random.normal(keys[0], (VOCAB, width))},
        "layers": {
            "up": jax.random.normal(keys[1], (layers, width, 2 * width)) / width**0.5,
            "down": jax.random.normal(keys[2], (layers, 2 * width, width)) / width**0.5,
            "norm": jnp.ones((layers, width)),
        },
        "head": {"kernel": jax.random.normal(keys[3], (width, VOCAB)) / width**0.5},
    }


def embed(p, batch):
    return p["table"][batch]


def block(p, x):
    x = x + jnp.tanh(x * p["norm"] @ p["up"]) @ p["down"]
    return x / jnp.sqrt(1 + jnp.mean(x * x, -1, keepdims=True))


def head(p, x, batch):
    logits = (x @ p["kernel"])[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


def loss_of(params, batch, block=block):
    x = embed(params["embed"], batch)
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])
    return head(params["head"], x, batch)


def plain_step(tx, block=block):
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch, block)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, {"loss": loss}

    return step


def batches(steps=5):
    return np.random.default_rng(0).integers(0, VOCAB, (steps, 4, 9))


def run(step, tx, steps=5):
    step = jax.jit(step)
    params = make_params()
    state, losses = tx.init(params), []
    for batch in batches(steps):
        params, state, metrics = step(params, state, batch)
        losses.append(metrics["loss"])
    return params, state, jnp.stack(losses), metrics


def low(method, **options):
    return method(1e-2, rank=4, update_proj_gap=2, layer_axis=0, **options)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, eps=1e-4),
    "galore": lambda: low(lro.galore, eps=1e-4),
    "subtrack": lambda: low(lro.subtrack, eps=1e-4),
    "fira": lambda: low(lro.fira, eps=1e-4),
    "gwt": lambda: lro.gwt(1e-2, layer_axis=0, eps=1e-4),
    "apollo": lambda: low(lro.apollo, eps=1e-4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_plain_step(name):
    """Through refreshes at steps 0, 2 and 4; eps keeps rounding from growing."""
    tx = OPTIMIZERS[name]()
    plain = run(plain_step(tx), tx)
    ours = run(lro.layerwise.train_step(embed, block, head, tx), tx)
    assert jax.tree.structure(plain[:2]) == jax.tree.structure(ours[:2])
    np.testing.assert_allclose(ours[2], plain[2], rtol=0, atol=1e-6)
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(ours[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        optax.apply_if_finite(optax.adam(1e-2), 3),
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    ],
    ids=["clip", "guard", "accumulation"],
)
def test_refuses_what_couples_leaves(tx):
    step = lro.layerwise.train_step(embed, block, head, tx)
    params = make_params()
    with pytest.raises(ValueError, match="depends on the gradient of"):
        jax.eval_shape(step, params, tx.init(params), batches(1)[0])


def test_clips_by_the_exact_norm():
    chained = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-4))
    tx = optax.chain(optax.identity(), optax.adam(1e-2, eps=1e-4))
    step = lro.layerwise.train_step(embed, block, head, tx, clip_norm=0.5)
    ours, plain = run(step, tx), run(plain_step(chained), chained)
    assert float(ours[3]["grad_norm"]) > 0.5
    np.testing.assert_allclose(ours[2], plain[2], rtol=0, atol=1e-6)


def test_skips_a_step_that_is_not_finite():
    tx = OPTIMIZERS["adamw"]()
    params = make_params()
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(jnp.nan)
    step = lro.layerwise.train_step(embed, block, head, tx, skip_nonfinite=True)
    state = tx.init(params)
    after, new, metrics = jax.jit(step)(params, state, batches(1)[0])
    assert bool(metrics["skipped"])
    jax.tree.map(np.testing.assert_array_equal, (after, new), (params, state))


def test_refuses_what_it_cannot_cut():
    params = make_params()
    batch = batches(1)[0]
    tx = low(lro.galore, stagger=True)
    step = lro.layerwise.train_step(embed, block, head, tx)
    with pytest.raises(ValueError, match="stagger=False"):
        jax.eval_shape(step, params, tx.init(params), batch)
    tx = optax.sgd(0.1)
    step = lro.layerwise.train_step(embed, block, head, tx)
    with pytest.raises(ValueError, match="head_names="):
        jax.eval_shape(step, params | {"norm": jnp.ones(3)}, tx.init(params), batch)
    params["layers"]["norm"] = jnp.ones((2, WIDTH))
    with pytest.raises(ValueError, match="first axis"):
        jax.eval_shape(step, params, tx.init(params), batch)


def memory(step, tx, params, batch):
    step = jax.jit(step, donate_argnums=(0, 1))
    state = jax.eval_shape(tx.init, params)
    return step.lower(params, state, batch).compile().memory_analysis()


def test_keeps_one_gradient_at_a_time():
    """Eight layers: the gradient of one, not of all, beside donated stacks."""
    tx = low(lro.galore)
    params = jax.eval_shape(lambda: make_params(8, 128))
    batch = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    wrapped = jax.checkpoint(block)  # in both: what is saved is gradients
    step = lro.layerwise.train_step(embed, wrapped, head, tx)
    ours = memory(step, tx, params, batch)
    plain = memory(plain_step(tx, wrapped), tx, params, batch)
    assert ours.temp_size_in_bytes < 0.5 * plain.temp_size_in_bytes
    trees = (params, jax.eval_shape(tx.init, params))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))
    assert ours.alias_size_in_bytes >= size
