"""One step: micro-batches, clipping, the guard, the registry, the schedule."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.batches import as_batch
from examples.llama.config import RANGES, TrainConfig, UsageError, resolve
from examples.llama.model import abstract_model, init_params
from examples.llama.presets import PRESETS, RATES
from examples.llama.step import make_steps, mean_gradient, split_rows

RECIPE = PRESETS["tiny"].recipe

# Those with Adam, or codes of it, on the leaves that they do not project.
LOW_RANK = [
    name
    for name in optimizers.OPTIMIZERS
    if name not in (*optimizers.FULL, "galore_adafactor")
]


@pytest.fixture(scope="module")
def definition(micro_config):
    return abstract_model(micro_config)[0]


@pytest.fixture(scope="module")
def params(micro_config):
    return jax.tree.map(np.asarray, init_params(micro_config, 0))


@pytest.fixture
def batch():
    """Rows of very different length: a mean of means would differ."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 264, n).tolist() for n in (17, 3, 17, 2, 9, 17, 4, 6)]
    return as_batch(rows, 8, 16)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_has_a_learning_rate_of_its_own(name):
    config, _ = resolve(TrainConfig(preset="tiny", optimizer=name))
    assert config.lr == pytest.approx(RATES.get(name, 1.0) * RECIPE.lr)
    told, _ = resolve(TrainConfig(preset="tiny", optimizer=name, lr=0.02))
    assert told.lr == 0.02


def test_learning_rates_are_of_known_optimizers_and_of_adamw_above_all():
    assert RATES.keys() <= optimizers.OPTIMIZERS.keys()
    assert RATES["adamw"] == RATES["adamw_8bit"] < 1.0


def test_micro_batches_equal_one_big_batch(definition, params, batch):
    gradient = jax.jit(lambda p, b: mean_gradient(definition, p, b))
    loss, whole = gradient(params, split_rows(batch, 1))
    part_loss, summed = gradient(params, split_rows(batch, 4))
    assert float(part_loss) == pytest.approx(float(loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        scale = float(np.abs(a).max())
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)


def settings(micro_preset, **flags):
    del micro_preset
    return resolve(TrainConfig(**{"preset": "micro", "optimizer": "galore"} | flags))[0]


def poison(params):
    """Parameters whose gradient is not finite."""
    return params | {"norm": {"scale": params["norm"]["scale"] * np.nan}}


def test_the_guard_leaves_everything_as_it_was(micro_preset, definition, params, batch):
    config = settings(micro_preset, optimizer="galore")
    tx = optimizers.guarded(config, optimizers.build_optimizer(config))
    step = jax.jit(tx.update)
    micro = split_rows(batch, 1)
    grads = jax.jit(lambda p: mean_gradient(definition, p, micro)[1])(params)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads)

    state = jax.jit(tx.init)(params)
    _, state = step(grads, state, params)
    updates, skipped = step(bad, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert int(skipped.total_notfinite) == int(skipped.notfinite_count) == 1
    for a, b in zip(
        jax.tree.leaves(state.inner_state),
        jax.tree.leaves(skipped.inner_state),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    expected, _ = step(grads, state, params)
    found, after = step(grads, skipped, params)
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert int(after.notfinite_count) == 0


def test_steps_report_what_they_skip(micro_preset, definition, params, batch):
    config = settings(micro_preset, optimizer="adamw")
    tx = optimizers.guarded(config, optimizers.build_optimizer(config))
    steps = make_steps(definition, tx)
    poisoned = jax.tree.map(jnp.asarray, poison(params))
    _, _, metrics = steps.train(poisoned, tx.init(params), split_rows(batch, 1))
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    assert float(metrics["tokens"]) == batch["mask"].sum()


def test_clipping(micro_preset, params):
    config = dataclasses.replace(
        settings(micro_preset, optimizer="adamw", clip=0.5), eps=1.0
    )
    grads = jax.tree.map(lambda p: np.full(p.shape, 3.0, np.float32), params)
    plain = optimizers.build_optimizer(config)
    tx = optimizers.guarded(config, plain)
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    small = jax.tree.map(lambda g: g * (0.5 / optax.tree.norm(grads)), grads)
    expected, _ = jax.jit(plain.update)(small, plain.init(params), params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_schedule(micro_preset):
    config = settings(micro_preset, steps=100, warmup=10, lr=2.0)
    lr = jax.jit(optimizers.learning_rate(config))
    # Warm-up starts at 0, as in the papers' scripts; float32 cosine.
    for step, expected in [(0, 0.0), (5, 1.0), (10, 2.0), (55, 1.1), (100, 0.2)]:
        assert float(lr(step)) == pytest.approx(expected, rel=1e-5)


# Numbers of state for an m x n matrix, m <= n, at rank r: mostly two moments of r x n
# and a basis of m x r.
NUMBERS = {
    # and two moments of the basis
    "online_subspace_descent": lambda m, n, r: 2 * r * n + 3 * m * r,
    # and no basis: drawn from a key, or r numbers of columns
    "apollo": lambda m, n, r: 2 * r * n,
    "apollo_mini": lambda m, n, r: 2 * n,
    "dct_adamw": lambda m, n, r: 2 * r * n + r,
    # on both sides, and twenty gradients with their norms
    "natural_galore": lambda m, n, r: (m + n) * r + 22 * r * r + 20,
    # two moments of a quarter of the input axis, which "down" (m of its n) has longer
    "gwt": lambda m, n, r: 2 * m * n / 4,
    "foam": lambda m, n, r: 2 * m * n / 4,
    # and what its basis and its residual have had of energy
    "alice": lambda m, n, r: 2 * r * n + m * r + r * r + n,
    # and factors, one momentum, a number for every row and column, or nothing
    "lora_pre": lambda m, n, r: 2 * r * (m + n),
    "muon": lambda m, n, r: m * n,
    "even_muon": lambda m, n, r: m * n + m + n,
    "dion": lambda m, n, r: m * n + m * r,
    "racs": lambda m, n, r: m + n + 1,
    "sinkgd": lambda m, n, r: 0,
    # and one moment only
    "sumo": lambda m, n, r: r * n + m * r,
    # and a basis of half the bytes; these moments are too few to be coded
    "galore_8bit": lambda m, n, r: 2 * r * n + m * r / 2,
    # and one of an eighth, a step and a zero for each row, and what the gap depends on
    "q_galore": lambda m, n, r: 2 * r * n + m * r / 8 + (5 * m + 25) / 4,
}
# Bytes of embedding and head, whose moments are codes with a scale for every 256 of a
# row.
FULL = {
    name: 2 * 2 * 264 * 32 + 8 * (264 + 2 * 32) for name in ("galore_8bit", "q_galore")
}
# Half a byte a number, scales for every 64 of a row, and whole second moments, as these
# tables are narrow.
FULL["even_muon"] = 264 * 32 + 2 * (264 + 5 * 32) + 2 * 4 * 264 * 32


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_leaves_embeddings_head_and_norms_full(name, micro_preset, params):
    given = {"rank": 1} if name == "apollo_mini" else {}
    config = settings(micro_preset, optimizer=name, **given)
    small = optimizers.state_bytes(optimizers.build_optimizer(config), params)
    full = optimizers.state_bytes(optax.adamw(1e-3), params)
    rank, layers, d, f = 8, 2, 32, 48
    numbers = NUMBERS.get(name, lambda m, n, r: 2 * r * n + m * r)
    attention = 4 * layers * 4 * (2 * d * d - numbers(d, d, rank))
    mlp = 3 * layers * 4 * (2 * d * f - numbers(d, f, rank))
    full_leaves = 2 * 4 * 2 * 264 * d
    rest = full_leaves - FULL.get(name, full_leaves)
    # What else it keeps (counters, the key, which bases are pending, a norm for every
    # matrix that is recovered) is small.
    assert full - small == pytest.approx(attention + mlp + rest, abs=200)


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize(
    ("preset", "dtype"), [("9m", "float32"), ("9m", "bfloat16"), ("7b", "bfloat16")]
)
def test_low_rank_saves_memory_in_both_types(preset, dtype, name):
    types = {"param_dtype": dtype, "compute_dtype": dtype}
    config, model = resolve(TrainConfig(preset=preset, optimizer=name, **types))
    params = abstract_model(model)[1]
    tx = optimizers.build_optimizer(config)
    adamw_bytes = optimizers.state_bytes(optax.adamw(1e-3), params)
    assert optimizers.state_bytes(tx, params) < adamw_bytes
    if (preset, dtype) != ("9m", "bfloat16"):
        return  # types of an update hang on no size, and the laws hold both types
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert before == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after)


def trajectory(tx, steps=4):
    """Updates of one stack of layers by gradients that do not depend on them."""
    params = {"layers": {"kernel": jnp.zeros((2, 12, 8))}}
    shape = (steps, 2, 12, 8)
    gradients = {"layers": {"kernel": jax.random.normal(jax.random.key(0), shape)}}

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates["layers"]["kernel"]

    return jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])(gradients)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("subtrack", {"b1": 0.8, "b2": 0.9, "scale": 0.5}), ("ldadam", {})],
)
def test_flags_reach_the_method_and_its_own_defaults_stand(micro_preset, name, flags):
    # Four steps: two bases of subtrack, and every flag shows from the second one on.
    config = settings(micro_preset, optimizer=name, rank=2, warmup=0, seed=3, **flags)
    gap = {} if name == "ldadam" else {"update_proj_gap": config.update_proj_gap}
    expected = getattr(lro, name)(
        optimizers.learning_rate(config), rank=2, layer_axis=0, seed=3, **gap, **flags
    )
    found = trajectory(optimizers.build_optimizer(config))
    np.testing.assert_array_equal(found, trajectory(expected))


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_adam_is_not_trained_under_another_name(name, micro_preset, params):
    config = settings(micro_preset, optimizer=name, rank=64)
    tx = optimizers.build_optimizer(config)
    message = f"--optimizer {name} projects no matrix of micro.*Lower --rank"
    with pytest.raises(UsageError, match=message):
        optimizers.check_projects(config, tx, params)


@pytest.mark.parametrize("name", ["galore", "adamw", "adamw_8bit"])
def test_what_its_name_says_is_trained(name, micro_preset, params):
    config = settings(micro_preset, optimizer=name)
    tx = optimizers.build_optimizer(config)
    optimizers.check_projects(config, tx, params)


def test_unknown_names(micro_preset):
    config = settings(micro_preset, optimizer="adamwx")
    with pytest.raises(UsageError, match=r"unknown optimizer 'adamwx'; known: adamw"):
        optimizers.build_optimizer(config)
    with pytest.raises(UsageError, match=r"unknown preset '10m'; known: tiny, 9m"):
        resolve(TrainConfig(preset="10m"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": 0}, "--rank must be from 1 to 1048576 .*; got 0"),
        ({"update_proj_gap": -1}, "--update-proj-gap must be from 1 .*; got -1"),
        ({"steps": 0}, "--steps must be from 1 to 2147483647"),
        ({"packing": "tight"}, "--packing must be one of padded, packed; got 'tight'"),
        ({"tokenizer": "words"}, "--tokenizer must be one of bytes, bpe"),
        ({"corpus": "web"}, "--corpus must be one of stdlib; got 'web'"),
        ({"compute_dtype": "int8"}, "--compute-dtype must be one of float32, bfloat16"),
        ({"batch_size": 10, "micro_batches": 4}, "10 cannot be cut into 4 equal"),
    ],
)
def test_flags_that_cannot_work(flags, message):
    with pytest.raises(UsageError, match=message):
        resolve(TrainConfig(**flags))


@pytest.mark.parametrize("name", sorted(RANGES))
def test_numbers_that_mean_nothing(name):
    """Neither what is in no order, nor what is beyond either end; the ends are good."""
    low, high, why = RANGES[name]
    flag = f"--{name.replace('_', '-')} must be from "
    for value in (math.nan, -math.inf, math.inf, -1, low - 1, 2 * high + 1):
        with pytest.raises(UsageError, match=flag) as error:
            resolve(TrainConfig(**{name: value}))
        assert why in str(error.value)
    for value in (low, high):
        same = {"micro_batches": value} if name == "batch_size" else {}
        same = {"batch_size": value} if name == "micro_batches" else same
        resolve(TrainConfig(**{name: value}, **same))


def test_every_number_has_a_range():
    hints = typing.get_type_hints(TrainConfig)
    numbers = {n for n, t in hints.items() if {int, float} & {t, *typing.get_args(t)}}
    assert numbers == RANGES.keys()
