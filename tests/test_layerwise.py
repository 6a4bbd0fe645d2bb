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


def low_svd(method, **options):
    """By SVD, where the projector is not the point: it compiles fastest."""
    return method(1e-2, projector=lro.svd(4, 2), layer_axis=0, **options)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, eps=1e-4),
    "galore": lambda: low(lro.galore, eps=1e-4),
    "subtrack": lambda: low(lro.subtrack, eps=1e-4),
    "fira": lambda: low(lro.fira, eps=1e-4),
    "gwt": lambda: lro.gwt(1e-2, layer_axis=0, eps=1e-4),
    "matched": lambda: low_svd(lro.fira, eps=1e-4, match="adamw", full_scale=0.5),
    "apollo": lambda: low(lro.apollo, eps=1e-4),
    # One counter for all layers of a leaf, which no other part has.
    "complement": lambda: lro.chain(
        # By name: with all of it complemented nothing is saved.
        lro.project(lro.svd(2), layer_axis=0, select="layers"),
        # What is left of a gradient has small entries: a larger eps for rounding.
        optax.scale_by_adam(eps=1e-3),
        lro.complement(optax.scale_by_adam(eps=1e-3)),
        lro.backproject(learning_rate=1e-2),
    ),
    # Its own moments hold the sum, one gradient of all layers; correct all the same.
    "accumulation": lambda: optax.MultiSteps(
        optax.adamw(1e-2, eps=1e-4), 2
    ).gradient_transformation(),
    # The layer reaches a bracket through Optax' own combinators: its keys are by layer.
    "partition": lambda: optax.partition(
        {"low": low(lro.apollo, eps=1e-4), "full": optax.adamw(1e-2, eps=1e-4)},
        lambda params: {k: "low" if k == "layers" else "full" for k in params},
    ),
    # Codes that are rounded at random: a layer by the numbers that it has in its stack.
    "muon_4bit": lambda: lro.muon(1e-6, bits=4, min_size=0, layer_axis=0),
    "even_muon": lambda: lro.even_muon(1e-6, bits=4, min_size=0, layer_axis=0),
    # One code off, of 256, is 4e-3 of a moment: rounding may decide on a few.
    "galore_8bit": lambda: low(lro.galore_8bit, eps=1e-2, min_size=33, scale=1e-3),
}


# Fira stands under "matched" too, and APOLLO in "partition".
MARKS = {
    "galore_8bit": pytest.mark.slow,
    "muon_4bit": pytest.mark.slow,
    "even_muon": pytest.mark.variant,
    "fira": pytest.mark.variant,
    "apollo": pytest.mark.variant,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in OPTIMIZERS]
)
def test_equals_the_plain_step(name):
    """Through refreshes at steps 0, 2 and 4; eps keeps rounding from growing."""
    tx = OPTIMIZERS[name]()
    plain = run(plain_step(tx), tx)
    ours = run(lro.layerwise.train_step(embed, block, head, tx), tx)
    assert jax.tree.structure(plain[:2]) == jax.tree.structure(ours[:2])
    np.testing.assert_allclose(ours[2], plain[2], rtol=0, atol=1e-6)
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(ours[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def on_layers(tx):
    """A transformation of the layers' part alone."""

    def mask(params):
        return {
            part: jax.tree.map(lambda _, part=part: part == "layers", tree)
            for part, tree in params.items()
        }

    return optax.masked(tx, mask)


def block_rms_inside():
    inner = optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_adam())
    return low(lro.galore, base_optimizer=inner)


def rolled():
    """Each layer's update is the next layer's gradient; no norm, no reduction."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u: jnp.roll(u, 1, 0), updates)
    )


def by_place():
    """A rate that falls with the depth, told by a layer's place in its stack."""

    def scaled(u):
        return u / jnp.arange(1, len(u) + 1).reshape(-1, *[1] * (u.ndim - 1))

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates))


def late(tx):
    """Seen only where an accumulation ends."""
    return optax.MultiSteps(tx, 5).gradient_transformation()


SEVERAL = "depends on several layers at once"
COUPLED = {
    "clip": (lambda: optax.clip_by_global_norm(1.0), "the gradient of head, layers"),
    "guard": (lambda: optax.apply_if_finite(optax.sgd(1.0), 3), "the gradient of"),
    "clip of the layers": (lambda: on_layers(optax.clip_by_global_norm(1.0)), SEVERAL),
    "clip of a leaf": (lambda: optax.clip_by_block_rms(1.0), SEVERAL),
    "in a bracket": (block_rms_inside, SEVERAL),
    "trust ratio": (lambda: optax.lamb(1e-2), SEVERAL),
    "parameter scale": (lambda: optax.adafactor(1e-2), SEVERAL),
    "a bound far off": (lambda: on_layers(optax.clip_by_global_norm(1e9)), SEVERAL),
    "a guard of a part": (
        lambda: on_layers(optax.apply_if_finite(optax.sgd(1.0), 3)),
        "the gradient of layers",
    ),
    "after a while": (lambda: late(optax.clip_by_block_rms(1.0)), SEVERAL),
    "next layer": (lambda: on_layers(rolled()), SEVERAL),
    "place": (lambda: on_layers(by_place()), "a layer's place"),
    "noise": (lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)), "one draw"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_refuses_what_couples(name):
    make, message = COUPLED[name]
    tx = make()
    step = lro.layerwise.train_step(embed, block, head, tx)
    params = make_params()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, jax.eval_shape(tx.init, params), batches(1)[0])


@pytest.mark.parametrize(
    "tx",
    [
        low_svd(lro.q_galore, min_size=33),
        low(lro.coap, side="both"),
        lro.ldadam(1e-2, rank=4, layer_axis=0, error_feedback=True),
        lro.adamw_8bit(1e-2, min_size=33),  # [L, d] is that large, one layer of it not
    ],
    ids=["q_galore", "coap", "ldadam", "adamw_8bit"],
)
def test_takes_every_kind_of_bracket(tx):
    """The ones above were taken too: without that they would not have stepped."""
    step = lro.layerwise.train_step(embed, block, head, tx)
    params = make_params()
    state = jax.eval_shape(tx.init, params)
    _, after, _ = jax.eval_shape(step, params, state, batches(1)[0])
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (state, after)]
    assert kinds[0] == kinds[1]


def test_takes_operations_of_any_kind():
    """A loop with an open end, a transform, sorts, a call: all of one layer alone."""

    @jax.custom_vjp
    def odd(u):
        u, _ = jax.lax.while_loop(
            lambda c: c[1] < 2, lambda c: (jnp.fft.fft(c[0]).real, c[1] + 1), (u, 0)
        )
        return jnp.cumsum(jnp.sort(u, -1), -1) + jax.lax.top_k(u, 1)[0]

    odd.defvjp(lambda u: (odd(u), ()), lambda _, g: (g,))

    def update(updates, params):
        # A barrier over all leaves mixes none of them.
        return jax.tree.map(odd, jax.lax.optimization_barrier(updates))

    tx, params = optax.stateless(update), make_params()
    step = lro.layerwise.train_step(embed, block, head, tx)
    jax.eval_shape(step, params, tx.init(params), batches(1)[0])


def test_a_layer_that_happens_to_look_like_another_axis():
    """As many layers as rows, and as the rank: nothing is found by its size."""
    params = make_params(WIDTH, WIDTH)
    tx = lro.galore(1e-2, projector=lro.svd(WIDTH // 2), layer_axis=0, eps=1e-4)
    step = jax.jit(lro.layerwise.train_step(embed, block, head, tx))
    ours = step(params, tx.init(params), batches(1)[0])
    plain = jax.jit(plain_step(tx))(params, tx.init(params), batches(1)[0])
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(ours[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_asks_once_about_a_structure(monkeypatch):
    from lowrank_optax.layerwise.update import LayerUpdate

    asked = []
    monkeypatch.setattr(LayerUpdate, "refuse_coupling", lambda self: asked.append(self))
    tx, params = optax.sgd(0.1), make_params()
    step = lro.layerwise.train_step(embed, block, head, tx)
    for batch in (batches(1)[0], batches(1)[0][:2]):
        jax.eval_shape(step, params, tx.init(params), batch)
    assert len(asked) == 1


def test_micro_batches_are_one_batch():
    """Gradients are summed layer by layer: as a plain step on the mean of losses."""
    tx = low_svd(lro.galore, eps=1e-4)
    plain = run(plain_step(tx), tx)
    step = lro.layerwise.train_step(embed, block, head, tx, micro_batches=2)
    cut = lambda p, s, batch: step(p, s, batch.reshape(2, 2, -1))  # noqa: E731
    ours = run(cut, tx)
    np.testing.assert_allclose(ours[2], plain[2], rtol=0, atol=1e-6)
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(ours[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"micro_batches=2 as its first axis"):
        jax.eval_shape(step, ours[0], ours[1], batches(1)[0])


def test_clips_part_by_part():
    """With SGD the step shows the norms: each layer's, not the leaf's."""
    tx, params, batch = optax.sgd(1.0), make_params(), batches(1)[0]
    step = lro.layerwise.train_step(
        embed, block, head, tx, clip_norm=0.1, clip_by="part"
    )
    after, _, metrics = jax.jit(step)(params, tx.init(params), batch)
    grads = jax.jit(jax.grad(loss_of))(params, batch)
    moved = jax.tree.map(lambda a, b: a - b, params, after)
    norms = lambda tree: jnp.sqrt(  # noqa: E731
        sum(jnp.sum(x**2, range(1, x.ndim)) for x in jax.tree.leaves(tree["layers"]))
    )
    expected = np.minimum(norms(grads), 0.1)
    assert (expected == np.float32(0.1)).any()
    np.testing.assert_allclose(norms(moved), expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_clips_by_the_exact_norm():
    chained = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-4))
    tx = optax.chain(optax.identity(), optax.adam(1e-2, eps=1e-4))
    step = lro.layerwise.train_step(embed, block, head, tx, clip_norm=0.5)
    ours, plain = run(step, tx), run(plain_step(chained), chained)
    assert float(ours[3]["grad_norm"]) > 0.5
    np.testing.assert_allclose(ours[2], plain[2], rtol=0, atol=1e-6)


def test_a_head_that_reads_the_embedding():
    """Both uses are in its gradient, and in the norm to clip by."""

    def tied(p, x, batch, e):
        return head({"kernel": e["table"].T * p["gain"]}, x, batch)

    def loss(params, batch):
        x = embed(params["embed"], batch)
        x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])
        return tied(params["head"], x, batch, params["embed"])

    tx = optax.chain(optax.identity(), optax.adam(1e-2, eps=1e-4))
    step = lro.layerwise.train_step(
        embed, block, tied, tx, clip_norm=0.5, micro_batches=2, tied=True
    )
    ours, plain = (make_params() | {"head": {"gain": jnp.ones(VOCAB)}} for _ in "ab")
    state, clip = tx.init(ours), optax.clip_by_global_norm(0.5)
    other, step, gradient = state, jax.jit(step), jax.jit(jax.grad(loss))
    for batch in batches(3):
        ours, state, metrics = step(ours, state, batch.reshape(2, 2, -1))
        grads = gradient(plain, batch)
        np.testing.assert_allclose(
            metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5
        )
        assert metrics["grad_norm"] > 0.5
        updates, other = tx.update(clip.update(grads, ())[0], other, plain)
        plain = optax.apply_updates(plain, updates)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


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
    with pytest.raises(ValueError, match=r"tx.init has None"):
        jax.eval_shape(step, params, optax.adam(0.1).init(params), batch)
    params["layers"]["norm"] = jnp.ones((2, WIDTH))
    with pytest.raises(ValueError, match="first axis"):
        jax.eval_shape(step, params, tx.init(params), batch)


def memory(step, tx, params, batch):
    step = jax.jit(step, donate_argnums=(0, 1))
    state = jax.eval_shape(tx.init, params)
    return step.lower(params, state, batch).compile().memory_analysis()


def test_keeps_one_gradient_at_a_time():
    """Eight layers: the gradient of one, not of all, beside donated stacks."""
    tx = low_svd(lro.galore)
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
