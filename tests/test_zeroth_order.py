"""Gradient estimates from losses alone: expectation, variance, keys, meshes, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.step import token_losses
from lowrank_optax.quantization.rounding import round_to_float16
from lowrank_optax.zeroth_order import noise

KEY = jax.random.key(0)
METHODS = {
    "mezo": lro.mezo(),
    "subzero": lro.subzero(2, update_proj_gap=3, select="kernel"),
    "tezo": lro.tezo(2, select="kernel"),
    "lozo": lro.lozo(2, update_proj_gap=3, select="kernel"),
}


def every_method(function):
    return pytest.mark.parametrize("name", METHODS)(function)


# --- numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_threefry_has_the_known_answers(key, counter, expected):
    words = jnp.asarray([key, counter], jnp.uint32)
    found = noise.threefry(words[0], *words[1])
    assert tuple(map(int, found)) == expected


def test_numbers_are_normal_and_slices_are_those_of_the_whole():
    seed = jnp.asarray([3, 4], jnp.uint32)
    whole = noise.normal(seed, (40, 50, 60))
    part = noise.normal(seed, (50, 60), jnp.uint32(7))
    np.testing.assert_array_equal(whole[7], part)
    z, count = np.asarray(whole, np.float64).ravel(), whole.size
    # Five standard deviations of the sample moments of count normal numbers.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - mean) < 5 * (variance / count) ** 0.5
    # Neighbours along every axis are not correlated.
    for axis in range(3):
        ahead = np.roll(whole, 1, axis).ravel()
        assert abs((z * ahead).mean()) < 5 / count**0.5


def test_a_slice_that_counters_cannot_number_is_refused():
    with pytest.raises(ValueError, match="more than 2\\^32 numbers"):
        jax.eval_shape(lambda s: noise.normal(s, (2, 1 << 17, 1 << 16)), noise_seed())


def noise_seed():
    return jnp.zeros(2, jnp.uint32)


def test_float16_is_rounded_without_bias():
    numbers = np.asarray([0.1, 1.0, -3e-6, 4e-8, 60000.3, 1e6, -0.0], np.float32)
    draws = jnp.arange(1 << 16, dtype=jnp.uint32)  # every draw once
    rounded = jax.jit(jax.vmap(lambda x: round_to_float16(jnp.full(1 << 16, x), draws)))
    exact = np.clip(numbers.astype(np.float64), -65504, 65504)
    for number, found in zip(exact, np.asarray(rounded(numbers), float), strict=True):
        near = sorted(set(found))
        assert len(near) <= 2
        assert near[0] <= number <= near[-1]
        # The mean over all draws is off by less than one draw.
        assert abs(found.mean() - number) <= (near[-1] - near[0]) / (1 << 16)


# --- expectation and variance ------------------------------------------------------

M, N, RANK = 6, 5, 2
DRAWS = 20_000


def excess(name):
    """E|g|^2 - 1 for a gradient of norm 1, section by section derived."""
    if name == "mezo":
        return M * N + 1
    if name == "lozo":
        return M * N + 1 + (2 * (M + N) + 2) / RANK
    if name == "tezo":
        return M * N + 1 + (2 * M * N + 6 * (M + N) + 10) / RANK
    # Z = c U z V^T with normal z: |Z|^2 = c^2 |z|^2 and <G, Z> = c <U^T G V, z>, so
    # E[<G, Z>^2 |Z|^2] = c^4 (r^2 + 2) E|U^T G V|^2, and E|U^T G V|^2 = r^2 / (m n).
    return (M * N) * (RANK**2 + 2) / RANK**2 - 1


@every_method
def test_expectation_and_variance_on_a_quadratic(name):
    """Against the true gradient, within five standard errors of the sample itself."""
    rng = np.random.default_rng(0)
    true = rng.standard_normal((M, N)).astype(np.float32)
    true /= np.linalg.norm(true)
    # The gradient of this at zero is `true`, and its curvature drops out of k exactly.
    zo = lro.zeroth_order(
        lambda p: jnp.sum(true * p["kernel"]) + jnp.sum(p["kernel"] ** 2),
        METHODS[name],
        eps=0.5,
    )
    params = {"kernel": jnp.zeros((M, N))}

    @jax.jit
    @jax.vmap
    def draw(key):
        (_, grads), _ = zo.value_and_grad(params, zo.init(params, key))
        return grads["kernel"]

    found = np.asarray(draw(jax.random.split(KEY, DRAWS)), np.float64)
    error = found.std(0) / DRAWS**0.5
    assert np.max(np.abs(found.mean(0) - true) / error) < 5
    lengths = (found**2).sum((1, 2)) - 1
    assert abs(lengths.mean() - excess(name)) < 5 * lengths.std() / DRAWS**0.5


def test_samples_divide_the_variance():
    true = np.ones((M, N), np.float32) / (M * N) ** 0.5
    params = {"kernel": jnp.zeros((M, N))}
    zo = lro.zeroth_order(lambda p: jnp.sum(true * p["kernel"]), samples=4)

    @jax.jit
    @jax.vmap
    def draw(key):
        (_, grads), _ = zo.value_and_grad(params, zo.init(params, key))
        return jnp.sum(grads["kernel"] ** 2)

    lengths = np.asarray(draw(jax.random.split(KEY, 4000)), np.float64) - 1
    error = lengths.std() / 4000**0.5
    assert abs(lengths.mean() - excess("mezo") / 4) < 5 * error


# --- one tree, drawn in many ways ---------------------------------------------------

LAYERS, WIDTH, WORDS, BATCH = 4, 8, 16, 8


def params_of():
    keys = jax.random.split(jax.random.key(1), 2)
    kernel = jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    return {
        "embed": jax.random.normal(keys[1], (WORDS, WIDTH)),
        "layers": {"bias": jnp.zeros((LAYERS, WIDTH)), "kernel": kernel},
    }


def loss_fn(params, tokens):
    def layer(x, p):
        p = lro.materialize(p)
        return x + jnp.tanh(x @ p["kernel"] + p["bias"]), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return jnp.mean(jnp.square(x - 1))


TOKENS = jnp.arange(BATCH) % WORDS
# The rounding of a loss is divided by twice this: with 1e-3 the projected gradients of
# two programs would agree to four digits.
EPS = 0.01


def close(found, expected, tolerance=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
        found,
        expected,
    )


@pytest.fixture(scope="module", params=["subzero", "tezo"])  # kept, and drawn again
def whole(request):
    """One step of a method with all leaves perturbed at once, from its second step."""
    method = METHODS[request.param]
    zo = lro.zeroth_order(loss_fn, method, eps=EPS)
    params = params_of()
    state = zo.init(params, KEY)._replace(count=jnp.int32(1))
    out = jax.jit(zo.value_and_grad)(params, state, TOKENS)
    return method, params, state, out


def test_a_step_moves_along_the_estimate(whole):
    """So the directions of both losses, of the estimate and of the step are one."""
    method, params, state, ((loss, grads), after) = whole
    # Stacks perturbed layer by layer are perturbed by the same numbers.
    zo = lro.zeroth_order(loss_fn, method, eps=EPS, scanned="layers")
    step = jax.jit(zo.step)
    moved, stepped, metrics = step(params, state, TOKENS, learning_rate=0.01)
    close(moved, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads))
    close(metrics["loss"], loss)
    assert int(stepped.count) == int(after.count) == 2
    assert not metrics["skipped"]
    # And that is the derivative along Z = grads / k, up to the curvature's eps^2.
    true = jax.grad(loss_fn)(params, TOKENS)
    k = float(metrics["projected_gradient"])
    assert abs(optax.tree.vdot(grads, true) / k - k) < 0.1 * abs(k)
    # Results have the types of arguments: one trace serves all steps.
    step(moved, stepped, TOKENS, learning_rate=0.01)
    assert step._cache_size() == 1


@pytest.mark.parametrize("whole", ["subzero"], indirect=True)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes_draw_the_same_numbers(whole, kind):
    method, params, _, ((_, grads), after) = whole
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = {
        "embed": P("data", None),
        "layers": {"bias": P(None, "model"), "kernel": P(None, "data", "model")},
    }

    def loss(params, tokens):
        if kind == AxisType.Auto:
            return loss_fn(params, tokens)

        # A model of Explicit axes says how its products lie; here they lie whole.
        def whole_leaf(x):
            return jax.sharding.reshard(lro.materialize(x), P())

        params = jax.tree.map(
            whole_leaf, params, is_leaf=lambda x: isinstance(x, lro.Perturbed)
        )
        return loss_fn(params, tokens)

    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        there = jax.device_put(params, places)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P()))
        zo = lro.zeroth_order(loss, method, eps=EPS, scanned="layers")
        state = zo.init(there, KEY)
        state = state._replace(count=state.count + 1)
        step = jax.jit(zo.step, out_shardings=(places, None, None))
        moved, state, _ = step(there, state, tokens, learning_rate=0.01)
        close(moved, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads))
        close(state.kept, after.kept, 1e-6)
        step(moved, state, tokens, learning_rate=0.01)
        assert step._cache_size() == 1


def test_replicas_average_two_losses():
    def loss(params, tokens):
        return jnp.mean(jnp.square(params["kernel"][tokens] - 1))

    params = {"kernel": params_of()["embed"]}
    options = {"method": METHODS["subzero"], "eps": EPS, "samples": 2}
    zo = lro.zeroth_order(loss, axis_name="data", **options)
    state = zo.init(params, KEY)

    def step(params, state, tokens):
        return zo.step(params, state, tokens, learning_rate=0.01)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
    )
    moved, _, metrics = jax.jit(spread)(params, state, TOKENS)
    alone = lro.zeroth_order(loss, **options)
    expected, _, same = jax.jit(alone.step)(params, state, TOKENS, learning_rate=0.01)
    close(moved, expected)
    close(metrics, same, 1e-4)
    mapped = jax.pmap(step, "data", in_axes=(None, None, 0), devices=jax.devices()[:4])
    out = jax.eval_shape(mapped, params, state, TOKENS.reshape(4, -1))
    assert out[0]["kernel"].shape == (4, WORDS, WIDTH)


def test_steps_run_in_a_scan_and_subspaces_are_renewed():
    zo = lro.zeroth_order(loss_fn, METHODS["subzero"])
    params = params_of()

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state, _ = zo.step(*carry, TOKENS, learning_rate=lambda count: 0.01)
            return (params, state), state.kept["layers"]["kernel"]

        return jax.lax.scan(body, (params, state), length=7)

    (_, state), (left, right) = run(params, zo.init(params, KEY))
    assert left.shape == (7, LAYERS, WIDTH, 2)
    # Three steps each: those of counts 0 to 2, 3 to 5 and 6.
    same = [bool(jnp.array_equal(left[i], left[i + 1])) for i in range(6)]
    assert same == [True, True, False, True, True, False]
    eye = jnp.broadcast_to(jnp.eye(2), (7, LAYERS, 2, 2))
    for basis in (left, right):
        gram = jnp.einsum("slmr,slmq->slrq", basis, basis)
        close(gram, eye, 1e-5)
    # Every layer has a subspace of its own, as has each side.
    flat = jnp.concatenate([left[-1], right[-1]])
    overlap = jnp.abs(jnp.einsum("amr,bmr->ab", flat, flat)) - 2 * jnp.eye(2 * LAYERS)
    assert float(jnp.max(overlap)) < 1.9
    # A resumed run: the state is arrays that any checkpoint keeps.
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {
        "int32",
        "uint32",
        "float32",
    }


# --- leaves ------------------------------------------------------------------------


def sum_of(params):
    leaves = [
        x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)


ODD = {
    "bool": jnp.array([True, False]),
    "conv": jnp.ones((3, 3, 4, 8)),
    "empty": jnp.ones((0, 4)),
    "half": jnp.ones(5, jnp.bfloat16),
    "heads": jnp.ones((8, 2, 4)),
    "int": jnp.arange(3),
    "kernel": jnp.ones((7, 1)),
    "none": None,
    "scalar": jnp.float32(2),
}


def test_odd_leaves_keep_shapes_and_dtypes():
    numbers = {
        **dict.fromkeys(ODD),
        "conv": lro.MatrixDimensionNumbers(2, 3, (0, 1)),
        "heads": lro.MatrixDimensionNumbers(0, (1, 2)),
        "kernel": lro.MatrixDimensionNumbers(0, 1),
    }
    method = lro.subzero(2, weight_dimension_numbers=numbers)
    zo = lro.zeroth_order(sum_of, method, trainable="^(?!scalar)")
    state = zo.init(ODD, KEY)
    (_, grads), _ = jax.eval_shape(zo.value_and_grad, ODD, state)
    moved, _, _ = jax.jit(zo.step)(ODD, state, learning_rate=0.1)
    kinds = [
        jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (ODD, grads, moved)
    ]
    assert kinds[0] == kinds[1] == kinds[2]
    changed = {k for k, x in moved.items() if x is not None and np.any(x != ODD[k])}
    assert changed == {"conv", "half", "heads", "kernel"}
    assert [x.shape for x in state.kept["heads"]] == [(8, 2), (8, 2)]
    assert [x.shape for x in state.kept["conv"]] == [(4, 2), (72, 2)]
    assert [x.shape for x in state.kept["kernel"]] == [(7, 1), (1, 1)]


def test_directions_follow_from_paths_and_not_from_places():
    params = {"b": jnp.zeros(6), "c": jnp.zeros(6)}
    zo = lro.zeroth_order(sum_of)

    def direction(params):
        (_, grads), _ = jax.jit(zo.value_and_grad)(params, zo.init(params, KEY))
        return grads["b"] / jnp.linalg.norm(grads["b"])

    alone, among = direction(params), direction({"a": jnp.zeros(6), **params})
    assert min(jnp.max(abs(alone - among)), jnp.max(abs(alone + among))) < 1e-6


@every_method
def test_nothing_hangs_on_promotion(name):
    params = {
        "bias": jnp.ones(4, jnp.float16),
        "kernel": jnp.ones((4, 4), jnp.bfloat16),
        "stack": jnp.ones((2, 3)),
    }

    def loss(params):
        (last,) = jax.lax.scan(
            lambda _, p: (None, lro.materialize(p)), None, params["stack"]
        )[1:]
        return sum_of({**params, "stack": last})

    zo = lro.zeroth_order(
        loss, METHODS[name], samples=2, clip=jnp.float32(1), scanned="stack"
    )
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = zo.init(params, KEY)
        jax.eval_shape(zo.value_and_grad, params, state)
        step = lambda *args: zo.step(*args, learning_rate=0.1)  # noqa: E731
        moved, after, _ = jax.eval_shape(step, params, state)
    for before, new in ((params, moved), (state, after)):
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (before, new)]
        assert kinds[0] == kinds[1]


def test_the_example_model_needs_a_wrapper_alone():
    config = ModelConfig(vocab_size=32, width=16, ff_width=24, layers=3, heads=2)
    definition, params = abstract_model(config)
    batch = {name: jnp.ones((2, 8), jnp.int32) for name in ("tokens", "targets")}
    batch["mask"] = jnp.ones((2, 8))

    def loss(params, wrap_layer):
        return jnp.mean(token_losses(definition, params, batch, wrap_layer))

    def step(params, wrap_layer):
        zo = lro.zeroth_order(loss, lro.subzero(2), scanned="layers")
        state = zo.init(params, KEY)
        return zo.step(params, state, wrap_layer, learning_rate=0.1)

    def wrap_layer(layer):
        return lambda x, params: layer(x, lro.materialize(params))

    moved, state, _ = jax.eval_shape(lambda p: step(p, wrap_layer), params)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, params)
    # The seven kernels of a layer; all else is drawn number by number.
    assert len(jax.tree.leaves(state.kept)) == 2 * 7
    with pytest.raises(TypeError, match=r"Call lro\.materialize on the parameters"):
        jax.eval_shape(lambda p: step(p, None), params)


def test_any_kind_of_key_makes_a_state_of_arrays():
    params = {"w": jnp.ones(3)}
    zo = lro.zeroth_order(sum_of)
    for key in (KEY, jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        state = zo.init(params, key)
        assert state.key.shape == (2,)
        assert state.key.dtype == jnp.uint32


# --- numbers that are not finite, and small ones -------------------------------------


def test_a_loss_that_is_not_finite_moves_nothing():
    # The last one is too large on one side, or for the difference.
    bad = jnp.asarray([1.0, np.nan, np.inf, 3e38], jnp.float32)
    zo = lro.zeroth_order(lambda params, bad: jnp.sum(params["w"]) * bad, samples=2)
    params = {"w": jnp.full(4, 1.5)}
    state = zo.init(params, KEY)

    @jax.jit
    @jax.vmap
    def both(bad):
        rate = jnp.where(bad == 1, 0.1, jnp.inf)
        moved = zo.step(params, state, bad, learning_rate=rate)
        return moved, zo.value_and_grad(params, state, bad)

    (moved, state, metrics), ((_, grads), _) = both(bad)
    assert list(metrics["skipped"]) == [False, True, True, True]
    assert list(state.count) == [1, 1, 1, 1]
    assert np.all(moved["w"][0] != 1.5)
    assert np.all(moved["w"][1:] == 1.5)
    assert np.all(grads["w"][1:] == 0)


def test_clip_bounds_the_projected_gradient():
    params = {"w": jnp.ones(100)}
    zo = lro.zeroth_order(lambda p: 1e4 * jnp.sum(p["w"]), clip=0.5)
    _, _, metrics = jax.jit(zo.step)(params, zo.init(params, KEY), learning_rate=0.0)
    assert abs(metrics["projected_gradient"]) == 0.5
    # Without it, what a 16-bit estimate cannot hold is as large as it can be.
    params = {"w": jnp.ones(100, jnp.float16)}
    zo = lro.zeroth_order(lambda p: 1e6 * jnp.sum(p["w"].astype(jnp.float32)), eps=0.1)
    (_, grads), _ = jax.jit(zo.value_and_grad)(params, zo.init(params, KEY))
    assert np.max(np.abs(grads["w"])) == np.finfo(np.float16).max


def test_steps_below_the_precision_count_on_average():
    params = {
        "bfloat16": jnp.ones(20_000, jnp.bfloat16),
        "float16": jnp.ones(20_000, jnp.float16),
        "stack": jnp.ones((2, 100, 100), jnp.bfloat16),
    }
    zo = lro.zeroth_order(
        lambda p: jnp.mean(p["bfloat16"].astype(jnp.float32)),
        lro.tezo(4, select="stack", layer_axis=0),
    )
    state = zo.init(params, KEY)
    (_, grads), _ = jax.jit(zo.value_and_grad)(params, state)
    grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
    # Numbers are 2^-7 or 2^-10 apart above 1, and half of that below.
    rate = 1e-4 / np.mean(np.abs(grads["bfloat16"]))
    step = jax.jit(zo.step)
    moved, _, _ = step(params, state, learning_rate=rate)
    for name, start in params.items():
        found = np.asarray(moved[name], np.float64) - 1
        wanted = -rate * grads[name]
        # Roundings are independent, each of a variance below the gap times its step.
        gap = float(jnp.finfo(start.dtype).eps)
        error = (gap * np.abs(wanted) * wanted**2).sum() ** 0.5
        # The estimate that this is compared with is itself rounded, to 8 or 11 bits.
        exact = (wanted**2).sum()
        assert abs((found * wanted).sum() - exact) < 5 * error + gap * exact
        assert np.mean(found != 0) < 0.5
    still, _, _ = step(params, state, learning_rate=0.0)
    close(still, params, 0)


# --- composition -------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.02),
        lro.galore(0.06, rank=4, update_proj_gap=20, scale=1.0, select="kernel"),
    ],
    ids=["adam", "galore"],
)
def test_estimates_train_with_any_transformation(tx):
    def loss(params):
        return jnp.mean(jnp.square(params["kernel"] - 1))

    zo = lro.zeroth_order(loss, METHODS["lozo"], samples=4)
    params = {"kernel": params_of()["embed"]}

    @jax.jit
    def run(params, state, opt_state):
        def body(carry, _):
            params, state, opt_state = carry
            (value, grads), state = zo.value_and_grad(params, state)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), value

        return jax.lax.scan(body, (params, state, opt_state), length=400)[1]

    losses = run(params, zo.init(params, KEY), tx.init(params))
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()


# --- memory ------------------------------------------------------------------------


def held(function, *args, **kwargs):
    """Bytes that a compiled program holds at its peak, arguments and all."""
    jitted = jax.jit(function, donate_argnums=(0, 1) if len(args) > 2 else ())
    found = jitted.lower(*args, **kwargs).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def test_a_step_in_place_takes_the_memory_of_inference():
    shapes = {
        "embed": jax.ShapeDtypeStruct((512, 64), jnp.float32),
        "layers": {
            "bias": jax.ShapeDtypeStruct((32, 64), jnp.float32),
            "kernel": jax.ShapeDtypeStruct((32, 64, 64), jnp.float32),
        },
    }
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32)
    forward = held(loss_fn, shapes, tokens)

    def bytes_of(method, scanned):
        zo = lro.zeroth_order(loss_fn, method, scanned=scanned)
        state = jax.eval_shape(zo.init, shapes, KEY)
        return held(zo.step, shapes, state, tokens, learning_rate=1e-6) / forward

    assert bytes_of(lro.mezo(), "layers") < 1.1
    assert bytes_of(lro.tezo(4), "layers") < 1.1
    # Otherwise the stacks are held twice; and backpropagation has their gradients.
    assert bytes_of(lro.mezo(), None) > 1.7

    def backward(params, state, tokens):
        grads = jax.grad(loss_fn)(params, tokens)
        return jax.tree.map(lambda p, g: p - 1e-6 * g, params, grads), state

    assert held(backward, shapes, jnp.zeros([]), tokens) / forward > 1.5


# --- bad input ---------------------------------------------------------------------

GOOD = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "`loss_fn` must be a function"),
        ({"method": "mezo"}, TypeError, r"one of lro\.mezo\(\).*got 'mezo'"),
        ({"samples": 0}, ValueError, "`samples` must be at least 1"),
        ({"samples": 1.5}, TypeError, "`samples` must be a positive int"),
        ({"eps": 0}, ValueError, "`eps` must be positive"),
        ({"eps": "1e-3"}, TypeError, "`eps` must be a number"),
        ({"eps": float("nan")}, ValueError, "`eps` must be positive"),
        ({"clip": -1.0}, ValueError, "`clip` must be positive"),
        ({"trainable": "x$"}, ValueError, "`trainable`='x.' matches no leaf.*bias"),
        ({"scanned": ["layers"]}, ValueError, "`scanned`=.* matches no leaf"),
        ({"method": lro.tezo(select="x$")}, ValueError, "chooses no matrix"),
        (
            {"method": lro.tezo(select="kernel"), "scanned": "kernel"},
            ValueError,
            "'kernel' of shape .8, 8. is named by `scanned`",
        ),
        ({"loss_fn": lambda p: p["bias"]}, TypeError, "must return a scalar"),
        ({"loss_fn": lambda p: (p["bias"][0], 1)}, TypeError, "without auxiliary"),
        (
            {"loss_fn": lambda p: p["bias"][0].astype(jnp.bfloat16)},
            TypeError,
            "must return float32 or float64, got bfloat16",
        ),
    ],
)
def test_bad_options_are_named(options, error, message):
    options = {"loss_fn": lambda p: p["bias"][0], **options}
    with pytest.raises(error, match=message):
        zo = lro.zeroth_order(options.pop("loss_fn"), **options)
        jax.eval_shape(lambda: zo.value_and_grad(GOOD, zo.init(GOOD, KEY)))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.ones(3, jnp.complex64), "leaf 'w' is complex64"),
        (jnp.ones(3, jnp.float8_e4m3fn), "leaf 'w' is float8"),
        (
            lro.quantize_weights({"w": jnp.ones((256, 256))}, select="w")["w"],
            "leaf 'w' is a QuantizedArray.*dequantize_weights",
        ),
    ],
)
def test_leaves_that_cannot_be_perturbed_are_named(leaf, message):
    zo = lro.zeroth_order(lambda p: 0.0)
    with pytest.raises(TypeError, match=message):
        zo.init({"w": leaf}, KEY)


def test_a_state_of_other_parameters_and_a_number_for_a_key_are_refused():
    zo = lro.zeroth_order(sum_of, METHODS["subzero"])
    state = zo.init(GOOD, KEY)
    other = {**GOOD, "kernel": jnp.ones((8, 4))}
    with pytest.raises(ValueError, match="not one of these parameters"):
        zo.step(other, state, learning_rate=0.1)
    with pytest.raises(TypeError, match=r"PRNG key, such as jax\.random\.key"):
        zo.init(GOOD, 0)


@pytest.mark.parametrize("method", [lro.subzero, lro.tezo, lro.lozo])
def test_ranks_are_checked_and_clipped(method):
    with pytest.raises(ValueError, match="`rank`"):
        method(0)
    with pytest.raises(TypeError, match="`rank`"):
        method("8")
    for rank, expected in [(100, 8), (0.25, 2), (lambda path: len(path), 6)]:
        assert method(rank).rank_of("kernel", 8, 16) == expected
