"""`--weights`: what is stored between steps, and how a step changes it."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from examples.llama import train
from examples.llama.batches import as_batch
from examples.llama.config import WEIGHTS, TrainConfig, UsageError, resolve
from examples.llama.model import abstract_model
from examples.llama.optimizers import build_optimizer, guarded
from examples.llama.report import readable_bytes
from examples.llama.step import make_steps, split_rows
from examples.llama.train import Trainer

TRAINED = [kind for kind in WEIGHTS if kind != "plain"]  # test_train.py trains that
ROUNDED = ("stochastic-bf16", "int8")  # at random
MATRICES = 2 * (4 * 32 * 32 + 3 * 32 * 48)
ROWS = 2 * (4 * 32 + 2 * 32 + 48)  # one group of codes each
OTHERS = 2 * 264 * 32 + 5 * 32
BYTES = {
    "stochastic-bf16": 2 * (MATRICES + OTHERS),
    "int8": MATRICES + 5 * ROWS + 4 * OTHERS,
    "split": 2 * (MATRICES + OTHERS),
}


@pytest.fixture
def config(micro_preset, shards, tmp_path) -> TrainConfig:
    """Flags under which a few steps at full learning rate learn something."""
    flags = {"data": shards, "run_dir": str(tmp_path / "run")}
    more = {"optimizer": "adamw", "checkpoint_every": 0, "eval_every": 0}
    return TrainConfig(preset="micro", warmup=0, **flags, **more)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 264, 17).tolist() for _ in range(4)]
    return split_rows(as_batch(rows, 4, 16), 1)


def bits(tree):
    return {
        jax.tree_util.keystr(path): (str(leaf.dtype), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@dataclasses.dataclass
class Watched:
    """A step, jitted or on its way to a compiled one, that notes its keys."""

    step: Any
    keys: list

    def __call__(self, params, opt_state, batch, key):
        self.keys.append(bits(jax.random.key_data(key)))
        return self.step(params, opt_state, batch, key)

    def lower(self, *args):
        return Watched(self.step.lower(*args), self.keys)

    def compile(self):
        return Watched(self.step.compile(), self.keys)

    def memory_analysis(self):
        return self.step.memory_analysis()


def run(config: TrainConfig, **changes):
    """The trainer behind its last step, its evaluation and the keys of its steps."""
    trainer, keys = Trainer(dataclasses.replace(config, **changes)), []
    trainer.steps = trainer.steps._replace(train=Watched(trainer.steps.train, keys))
    result = trainer.run(lambda: False)
    return trainer, result, keys


@pytest.mark.whole
@pytest.mark.parametrize("kind", TRAINED)
def test_training_and_going_on(kind, config, tmp_path, capsys):
    whole, result, keys = run(config, weights=kind)
    losses = [line["loss"] for line in whole.metrics.lines if "loss" in line]
    assert result is not None and len(losses) == 8 and losses[-1] < losses[0] - 0.3
    # Untrained it is a uniform guess: the evaluation decodes what training stored.
    assert result.loss < np.log(264) - 0.3
    assert len({str(key) for key in keys}) == 8

    parts = {"weights": kind, "run_dir": str(tmp_path / "parts")}
    stopped, _, first = run(config, stop_step=5, **parts)
    stopped.close()
    resumed, _, rest = run(config, resume=True, **parts)
    assert resumed.step == 8 and len(rest) == 3
    assert first + rest == keys
    assert bits(resumed.params) == bits(whole.params)
    assert bits(resumed.opt_state) == bits(whole.opt_state)
    resumed.close()

    other = "plain" if kind == "int8" else "int8"
    message = rf"another configuration .*weights: checkpoint '{kind}', now '{other}'\)"
    with pytest.raises(UsageError, match=message):
        Trainer(dataclasses.replace(config, resume=True, **parts | {"weights": other}))

    capsys.readouterr()
    closing = whole.task.closing(result, whole)
    table = train.summary(whole, closing, whole.close(), 1.0)
    assert f"micro, {MATRICES + OTHERS:,} parameters" in table
    (row,) = [line for line in table.splitlines() if f"weights, {kind} " in line]
    assert row.endswith(f"  {readable_bytes(BYTES[kind])}")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_and_the_optimizer_see_the_parameters_type(kind, dtype, config):
    flags = {"weights": kind, "param_dtype": dtype}
    if (kind, dtype) == ("split", "float32"):
        with pytest.raises(UsageError, match="leave --param-dtype float32 out"):
            resolve(dataclasses.replace(config, **flags))
        return
    resolved, model = resolve(dataclasses.replace(config, **flags))
    weights = lro.weight_storage(resolved.weights, resolved.param_dtype, layer_axis=0)
    params = abstract_model(model)[1]
    stored = jax.eval_shape(weights.store, params)
    assert jax.eval_shape(weights.load, stored) == params
    moments = jax.eval_shape(lambda s: optax.adam(1e-3).init(weights.load(s)), stored)
    assert {x.dtype.name for x in jax.tree.leaves(moments[0].nu)} == {dtype}
    updates = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
    after = jax.eval_shape(weights.apply, stored, updates, jax.random.key(0))
    assert after == stored


class Bigram(nnx.Module):
    """The next token's logits are the row of this one: a model quick to compile."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((264, 264)))

    def __call__(self, tokens):
        return self.kernel[...][tokens]


def start(kind: str, tx: Any, dtype: str = "float32", kernel: Any = 1.0):
    """The step, the stored parameters and the state of a bigram model."""
    weights = lro.weight_storage(kind, dtype, layer_axis=0)
    if kind == "split":
        tx, dtype = lro.split_weights(tx), "bfloat16"
    flags: Any = types.SimpleNamespace(clip=0, weights=kind)
    tx = guarded(flags, tx)
    params = {"kernel": jnp.broadcast_to(jnp.asarray(kernel, dtype), (264, 264))}
    train = make_steps(nnx.graphdef(Bigram()), tx, weights).train
    state: Any = tx.init(params)
    return train, jax.jit(weights.store)(params), state


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_skipped_step_changes_no_bit(kind, batch):
    kernel = jax.random.normal(jax.random.key(0), (264, 264))
    tx = optax.adamw(1e-2, weight_decay=0.1)
    train, stored, state = start(kind, tx, kernel=kernel)
    for step in range(3):
        stored, state, _ = train(stored, state, batch, lro.rounding_key(0, step))
    before, moments = bits(stored), bits(state.inner_state)
    bad = batch | {"mask": batch["mask"] * np.float32(np.nan)}
    stored, state, metrics = train(stored, state, bad, lro.rounding_key(0, 3))
    assert int(metrics["skipped"]) == 1
    assert bits(stored) == before and bits(state.inner_state) == moments
    stored, _, _ = train(stored, state, batch, lro.rounding_key(0, 4))
    assert bits(stored) != before


def test_steps_below_half_the_distance_to_the_next_number(batch):
    """The next bfloat16 numbers are 2^-8 below 1 and 2^-7 above it."""
    size = 2.0**-10
    tx = optax.chain(optax.scale_by_sign(), optax.scale(-size))

    def stepped(kind, dtype):
        train, stored, state = start(kind, tx, dtype)
        stored, *_ = train(stored, state, batch, lro.rounding_key(0, 0))
        return np.asarray(stored["kernel"], np.float32)

    assert np.all(stepped("plain", "bfloat16") == 1)
    exact = stepped("plain", "float32")
    assert set(np.unique(exact)) == {1 - size, 1, 1 + size}
    rounded = stepped("stochastic-bf16", "float32")
    train, stored, state = start("split", tx)
    stored, state, _ = train(stored, state, batch, None)
    full = lro.full_weights(stored, state)["kernel"]
    assert stored["kernel"].dtype == jnp.bfloat16 and np.all(stored["kernel"] == 1)
    # Half a code, above 1 and below it.
    assert np.max(np.abs(full - exact)) <= 2.0**-8 / 254
    assert np.all(rounded[exact == 1] == 1)
    up, down = rounded[exact > 1], rounded[exact < 1]
    assert set(up) == {1, 1 + 2.0**-7} and set(down) == {1, 1 - 2.0**-8}
    # An eighth of those and a quarter of these move: four standard errors.
    for moved, chance in ((up > 1, 1 / 8), (down < 1, 1 / 4)):
        error = 4 * np.sqrt(chance * (1 - chance) / moved.size)
        assert moved.mean() == pytest.approx(chance, abs=error)


@pytest.mark.parametrize("kind", ROUNDED)
def test_small_steps_are_made_in_the_mean(kind, batch):
    """A quarter of the distance to the next bfloat16 number, 1/32 of a code's."""
    ends = np.arange(264) % 256 < 2
    kernel = jax.random.uniform(jax.random.key(0), (264, 264), minval=0.25, maxval=0.5)
    kernel = jnp.where(ends, jnp.where(np.arange(264) % 2, 1.0, -1.0), kernel)
    tx = optax.stateless(lambda updates, params: {"kernel": size})
    size = jnp.broadcast_to(jnp.where(ends, 0.0, 2.0**-12), kernel.shape)
    weights = lro.weight_storage(kind, layer_axis=0)
    train, stored, state = start(kind, tx, kernel=kernel)
    before = weights.load(stored)["kernel"]
    for step in range(20):
        stored, state, _ = train(stored, state, batch, lro.rounding_key(0, step))
    moved = (weights.load(stored)["kernel"] - before)[:, ~ends]
    # An entry's rounding spreads by at most half of the 2/255 between two codes; the
    # mean of 264 x 260 of them over twenty steps by 7e-5: four of those.
    assert moved.mean() == pytest.approx(20 * 2.0**-12, abs=3e-4)


def test_keys_differ_by_step_and_seed():
    keys = [lro.rounding_key(*pair) for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len({str(bits(jax.random.key_data(key))) for key in keys}) == len(keys)


def test_unknown_kinds_are_refused(config):
    with pytest.raises(
        UsageError, match=r"--weights must be one of plain, stoch.*int8"
    ):
        resolve(dataclasses.replace(config, weights="int4"))


def test_three_bytes_for_weights_and_corrections(config):
    """What a checkpoint of a split run holds of its weights, bit by bit."""
    resolved, model = resolve(dataclasses.replace(config, weights="split"))
    assert (resolved.param_dtype, resolved.state_dtype) == ("bfloat16", "float32")
    params = abstract_model(model)[1]
    tx = guarded(resolved, build_optimizer(resolved))
    state = jax.eval_shape(tx.init, params)
    codes = optax.tree_utils.tree_get(state, "correction")
    norms = 5 * 32
    kept = lro.bytes_per_device((params, codes))
    assert kept == 3 * (MATRICES + OTHERS) + norms
    with pytest.raises(UsageError, match=r"--compressed .* --weights split"):
        resolve(dataclasses.replace(config, weights="split", compressed=True))
    resolve(dataclasses.replace(config, weights="split", layerwise=True))
