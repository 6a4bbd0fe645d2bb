"""Gradients averaged as projections: the bytes sent, and the same step."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.distributed.cases import (
    GAP,
    PARAMS,
    RANK,
    assert_close,
    galore,
    gradients,
    named,
)

DEVICES, MICRO = 8, 2
NUMBERS = {"dense": 64 * 32, "bias": 2 * 32, "up": 2 * 32 * 64, "norm": 16}
# side="left" projects the 64 rows of dense, the 32 rows of both matrices of up.
SMALL = NUMBERS | {"dense": RANK * 32, "up": 2 * RANK * 64}


def grid(x):
    """Rounds to multiples of 2^-14: sums of sixteen are exact in any order."""
    return np.round(np.asarray(x) * 2**14).astype(np.float32) / 2**14


def examples(gradient):
    """Sixteen gradients whose mean is the one given."""

    def spread(x):
        signs = np.where(np.arange(DEVICES * MICRO) % 4 < 2, 1, -1)
        noise = np.random.default_rng(x.size).normal(0, 0.2, x.shape)
        return grid(x) + signs.reshape(-1, *[1] * x.ndim) * grid(noise)

    return jax.tree.map(lambda x: spread(x).astype(np.float32), gradient)


@functools.cache
def given():
    """The gradients of every step, and the examples that have them as means."""
    found = [jax.tree.map(grid, gradient) for gradient in gradients(PARAMS)]
    return [(gradient, examples(gradient)) for gradient in found]


def loss(params, batch):
    """Linear, so that the gradient is the mean of the batch."""
    terms = jax.tree.map(lambda p, g: jnp.sum(p * jnp.mean(g, 0)), params, batch)
    return jnp.sum(jnp.stack(jax.tree.leaves(terms)))


def data_mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def make_step(tx, mesh=None, micro_batches=1, refresh=None, **options):
    """A step ``(params, state, batch) -> (updates, state, value)``, mapped and not."""
    gradient = lro.distributed.value_and_grad(
        loss,
        tx,
        axis_name=None if mesh is None else "data",
        micro_batches=micro_batches,
        refresh=refresh,
    )

    def step(params, state, batch):
        value, grads = gradient(params, state, batch)
        return *tx.update(grads, state, params), value

    if mesh is None:
        return step
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    return jax.shard_map(step, mesh=mesh, **specs, **options)


def compiled(tx, mesh="data", **options):
    """The program of a step."""
    step = make_step(tx, mesh and data_mesh(), **options)
    arguments = PARAMS, tx.init(PARAMS), given()[0][1]
    return jax.jit(step).lower(*arguments).compile()


def updates_of(step, tx):
    """Returns the updates of every step and the last state."""
    state, out = tx.init(PARAMS), []
    for _, batch in given():
        update, state, _ = step(PARAMS, state, batch)
        out.append(update)
    return out, state


def left(**options):
    return galore(side="left", projector=SVD, **options)


def whole_optimizer():
    """A bracket among neighbours, and matrices that refresh at different steps."""
    return optax.chain(
        optax.clip_by_global_norm(1e6),
        optax.inject_hyperparams(lambda learning_rate: left(stagger=True))(1.0),
        optax.add_decayed_weights(0.1),
    )


def labelled():
    def label(tree):
        return jax.tree.map(lambda leaf: "low" if leaf.ndim > 1 else "full", tree)

    return optax.partition({"low": left(), "full": optax.adam(1.0, eps=0.1)}, label)


def in_few_bits(projector=None, **options):
    projector = lro.quantize_basis(SVD)
    return galore(side="left", projector=projector, **options)


def low_band():
    bracket = lro.project(lro.wavelet(level=2), layer_axis=0)
    return lro.chain(bracket, optax.scale_by_adam(eps=0.1), lro.backproject())


SVD = lro.svd(RANK, GAP)
AT_GAPS: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP}
OPTIMIZERS = {
    "left": left,
    "galore": whole_optimizer,
    "bfloat16": lambda: galore(
        side="left", projector=lro.svd(RANK, GAP, basis_dtype=jnp.bfloat16)
    ),
    "wavelet": low_band,
}
OTHERS = {
    # Of R, [r, r], all but the diagonal is rounding, which an eps of 1 leaves so.
    "both sides": lambda: lro.galore(
        1.0, projector=SVD, side="both", scale=1.0, eps=1.0, layer_axis=0
    ),
    "partition": labelled,
    "fira": lambda: lro.fira(1.0, projector=SVD, eps=0.1, layer_axis=0),
    "four bits": in_few_bits,
    # Projections and updates are sqrt(m / r) times those of an orthonormal basis.
    "gaussian": lambda: lro.galore(
        1.0, projector=lro.gaussian(RANK, GAP), scale=0.25, eps=0.4, layer_axis=0
    ),
    "coap": lambda: lro.coap(
        1.0, **AT_GAPS, side="left", scale=1.0, eps=0.1, layer_axis=0
    ),
    "natural": lambda: lro.natural_galore(
        1.0, projector=SVD, scale=1.0, eps=0.1, layer_axis=0
    ),
}


@functools.cache
def program(name, **options):
    """The program of a named optimizer's step, compiled once for all tests."""
    return compiled((OPTIMIZERS | OTHERS)[name](), **options)


@functools.cache
def plain(name):
    """The plain update on one device."""
    return jax.jit((OPTIMIZERS | OTHERS)[name]().update)


@functools.cache
def reference(name):
    """The updates of every step from the means, on one device."""
    state, out = (OPTIMIZERS | OTHERS)[name]().init(PARAMS), []
    for gradient, _ in given():
        update, state = plain(name)(gradient, state, PARAMS)
        out.append(update)
    return out


@pytest.mark.parametrize(
    "name",
    [
        *OPTIMIZERS,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in OTHERS
            if name != "fira"
        ),
    ],
)
def test_the_step_is_that_of_the_plain_mean(name):
    """Refreshes at steps 0, 2 and 4 of 5, staggered ones at all of them."""
    tx = (OPTIMIZERS | OTHERS)[name]()
    assert "dense" in lro.distributed.traffic_report(tx, PARAMS).compressed
    updates, state = updates_of(program(name), tx)
    # The mean itself is exact here; what is projected twice is rounded twice.
    assert_close(updates, reference(name))
    for leaf in jax.tree.leaves((updates, state)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == DEVICES - 1
        for other in others:
            np.testing.assert_array_equal(first, other)


def sent(step):
    """All-reduces of a step: bytes of those in no branch, shapes of the others."""
    found = lro.collectives(step.as_text(), by_channel=False)
    assert {item.op for item in found} <= {"all-reduce"}
    always = [item for item in found if not item.conditional]
    return sum(x.total for x in always), [x.shapes for x in found if x.conditional]


def test_between_refreshes_the_bytes_are_r_by_m_of_the_plain_ones():
    one = 4  # bytes of a number; and the value of the loss is sent
    whole, _ = sent(program("left", refresh=True))
    assert whole == one * (sum(NUMBERS.values()) + 1)
    between, branches = sent(program("left", refresh=False))
    assert between == one * (sum(SMALL.values()) + 1)
    assert not branches
    either, branches = sent(program("left"))
    assert either == between
    # In the branch of a refresh, and of one layer of two at a time.
    assert sorted(branches) == [((32, 64),), ((64, 32),)]
    for path, m in (("dense", 64), ("up", 32)):
        assert SMALL[path] / NUMBERS[path] == RANK / m
    report = lro.distributed.traffic_report(left(), PARAMS)
    assert report.numbers == (sum(NUMBERS.values()), sum(SMALL.values()))


def test_micro_batches_are_sent_once():
    step = program("left", micro_batches=MICRO, refresh=False)
    assert sent(step) == (4 * (sum(SMALL.values()) + 1), [])


@pytest.mark.parametrize("mesh", [None, "data"])
def test_accumulation_alone_and_with_data_parallelism(mesh):
    step = program("left", mesh=mesh, micro_batches=MICRO)
    updates, _ = updates_of(step, left())
    assert_close(updates, reference("left"))


def test_accumulators_are_small_between_refreshes():
    """Compiled for the CPU, without the update: what the loop carries, and lifts."""
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    tx = lro.galore(1e-2, rank=8)
    state = jax.eval_shape(tx.init, params)
    batch = jax.ShapeDtypeStruct((8, 256), jnp.float32)

    def square(params, batch):
        return jnp.mean(jnp.square(batch @ params["w"]))

    def carried(refresh):
        gradient = lro.distributed.value_and_grad(
            square, tx, micro_batches=4, refresh=refresh
        )
        jaxpr = jax.make_jaxpr(gradient)(params, state, batch)
        (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        return sum(math.prod(v.aval.shape) for v in scan.outvars)

    assert carried(True) == 256 * 512 + 1
    assert carried(False) == 8 * 512 + 1


WHOLE = {
    "fira": (functools.partial(lro.fira, update_proj_gap=GAP), "recover_scale reads"),
    "subtrack": (functools.partial(lro.subtrack, update_proj_gap=GAP), "recover_scale"),
    "apollo": (functools.partial(lro.apollo, update_proj_gap=GAP), "recover_scale"),
    "frugal": (functools.partial(lro.frugal, update_proj_gap=GAP), "complement reads"),
    "ldadam": (lro.ldadam, "power_iteration refreshes its basis at every step"),
    "osd": (lro.online_subspace_descent, "online_pca moves its basis by the whole"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_methods_that_read_the_whole_gradient_say_so(name):
    method, why = WHOLE[name]
    tx = method(1e-2, rank=RANK, layer_axis=0)
    report = lro.distributed.traffic_report(tx, PARAMS)
    assert report.compressed == ()
    assert why in str(report)
    assert report.numbers[0] == report.numbers[1] == sum(NUMBERS.values())


@pytest.mark.slow
def test_methods_that_read_the_whole_gradient_get_it():
    updates, _ = updates_of(program("fira"), OTHERS["fira"]())
    assert_close(updates, reference("fira"))


def test_the_report_says_why():
    tx = optax.masked(left(), {"dense": True, "layers": True, "norm": False})
    text = str(lro.distributed.traffic_report(tx, PARAMS))
    assert "a projection between refreshes, 128 of 2048 numbers" in text
    assert "no bracket sees it" in text
    assert text.endswith("720 numbers between refreshes, 6,224 plainly")
    wide = lro.galore(1e-2, rank=16, select="w")
    report = lro.distributed.traffic_report(wide, {"w": jnp.ones((16, 64))})
    assert "its projection is not smaller: 1024 >= 1024" in str(report)


def test_clipping_is_by_the_norm_of_what_is_sent():
    """In the subspace plus the whole leaves; of the whole gradient at a refresh."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), left())
    updates, _ = updates_of(compiled(tx), tx)
    state: Any = left().init(PARAMS)
    for step, gradient in enumerate(g for g, _ in given()):
        part = gradient
        if step % GAP:
            within = lambda g, p: p @ (p.swapaxes(-1, -2) @ g)  # noqa: E731
            basis = state.basis
            up = within(gradient["layers"]["up"], basis["layers"]["up"])
            part = gradient | {
                "dense": within(gradient["dense"], basis["dense"]),
                "layers": gradient["layers"] | {"up": up},
            }
        norm = optax.tree.norm(part)
        assert norm > 1
        clipped = jax.tree.map(lambda g, norm=norm: g / norm, gradient)
        expected, state = plain("left")(clipped, state, PARAMS)
        assert_close(updates[step], expected)


def test_one_device_alone_poisons_none():
    """A NaN among the sixteen: the guard skips the step everywhere; it is redone.

    At a refresh, between two, and at a refresh.
    """
    tx = optax.apply_if_finite(left(), 10)
    step = compiled(tx)
    state: Any = tx.init(PARAMS)
    for i, (_, batch) in enumerate(given()[:3]):
        bad = batch | {"dense": batch["dense"].copy()}
        bad["dense"][5, 0, 0] = np.nan
        updates, after = step(PARAMS, state, bad)[:2]
        assert int(after.total_notfinite) == i + 1
        same = jax.tree.map(np.array_equal, after.inner_state, state.inner_state)
        assert jax.tree.all(same)
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        state = after
        updates, state, _ = step(PARAMS, state, batch)
        assert_close(updates, reference("left")[i])


def test_a_basis_is_owed_after_a_bad_gradient_without_a_guard():
    tx, step = left(), program("left")
    batch = given()[0][1]
    bad = batch | {"dense": batch["dense"].copy()}
    bad["dense"][5] = np.inf
    _, state, _ = step(PARAMS, tx.init(PARAMS), bad)
    assert bool(state.pending["dense"]) and not state.pending["layers"]["up"].any()
    assert bool(lro.distributed.refresh_due(tx, state, PARAMS))
    for leaf in jax.tree.leaves((state.basis, state.pending)):
        assert np.all(np.isfinite(leaf))
    _, state, _ = step(PARAMS, state, batch)
    assert not bool(state.pending["dense"])


def test_no_refresh_is_due_in_the_middle_of_an_accumulation_inside_the_bracket():
    tx = lro.chain(
        lro.project(SVD),
        optax.MultiSteps(optax.scale_by_adam(), 2),
        lro.backproject(),
    )
    params = {"w": jnp.ones((64, 32))}
    update = jax.jit(tx.update)
    state, due = tx.init(params), []
    for _ in range(4):
        due.append(bool(lro.distributed.refresh_due(tx, state, params)))
        _, state = update(params, state, params)
    assert due == [True, False, False, False]  # the first of two sums is


def test_types_of_bfloat16_parameters():
    """Compressed leaves come in float32, the others as they are; the state stays."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx, batch = left(), jax.tree.map(lambda x: x[None].repeat(16, 0), params)
    gradient = lro.distributed.value_and_grad(loss, tx, micro_batches=2)
    before = jax.eval_shape(tx.init, params)
    _, grads = jax.eval_shape(gradient, params, before, batch)
    assert grads["dense"].dtype == grads["layers"]["up"].dtype == jnp.float32
    assert grads["norm"].dtype == grads["layers"]["bias"].dtype == jnp.bfloat16
    _, after, _ = jax.eval_shape(make_step(tx, data_mesh()), params, before, batch)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (before, after)]
    assert types[0] == types[1]


def test_boxed_parameters():
    params: Any = {"w": nn.LogicallyPartitioned(jnp.ones((64, 32)), ("mlp", "embed"))}
    tx = left()
    batch = {"w": jnp.ones((16, 64, 32))}

    def boxed(params, batch):
        return loss(nn.meta.unbox(params), batch)

    gradient = lro.distributed.value_and_grad(boxed, tx, micro_batches=2)
    _, grads = jax.eval_shape(gradient, params, tx.init(params), batch)
    assert grads["w"].names == ("mlp", "embed")
    assert grads["w"].value.shape == (64, 32)


@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=str)
def test_parameters_sharded_over_another_axis(kind):
    """``data`` is manual, ``fsdp`` is left to the compiler."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    tx = left()
    specs = {
        "dense": P("fsdp"),
        "layers": {"bias": P(), "up": P(None, None, "fsdp")},
        "norm": P("fsdp"),
    }
    with jax.set_mesh(mesh):
        shardings = named(mesh, specs)
        params = jax.device_put(PARAMS, shardings)
        layout = lro.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=layout)(params)
        step = make_step(tx, mesh, axis_names={"data"})
        step = jax.jit(step, out_shardings=(shardings, layout, None))
        where = jax.tree.map(lambda s: NamedSharding(mesh, P("data", *s)), specs)
        batches = [jax.device_put(batch, where) for _, batch in given()]
        step, updates = step.lower(params, state, batches[0]).compile(), []
        for batch in batches:
            update, state, _ = step(params, state, batch)
            updates.append(update)
    assert_close(updates, reference("left"))
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    # A device sends its shard of what is whole, and of R; the products with the sharded
    # rows of dense are more sums, over fsdp. Plainly it would be half of NUMBERS.
    found = lro.collectives(str(step.as_text()), by_channel=False)
    reduced = [x for x in found if x.op == "all-reduce" and not x.conditional]
    assert sum(x.total for x in reduced) < 4 * sum(NUMBERS.values()) / 2 / 2


def test_pmap():
    """The plain mean in front of the update, and the smaller one in its place."""
    tx = left()
    plain = functools.partial(jax.lax.pmean, axis_name="data")

    def small(grads, state):
        return lro.distributed.pmean(grads, tx, state, PARAMS, "data")

    for average in (lambda grads, state: plain(grads), small):

        def step(params, state, batch, average=average):
            grads = jax.grad(loss)(params, batch)
            return tx.update(average(grads, state), state, params)

        step = jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)
        state, expected = tx.init(PARAMS), reference("left")
        for (_, batch), update in zip(given(), expected, strict=True):
            rows = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
            found, state = step(PARAMS, state, rows)
            assert_close(found, update)


# --- Bad input -----------------------------------------------------------------------


def call(step, tx=None, params=PARAMS, batch=None):
    tx = tx or left()
    batch = examples(params) if batch is None else batch
    return jax.eval_shape(step, params, tx.init(params), batch)


def test_an_unknown_axis():
    gradient = lro.distributed.value_and_grad(loss, left(), axis_name="dat")
    with pytest.raises(ValueError, match="axis_name='dat' is no mapped axis here"):
        call(gradient)


def test_no_bracket():
    tx = optax.adam(1e-3)
    with pytest.raises(ValueError, match="found no low-rank bracket"):
        call(make_step(tx, data_mesh()), tx)
    with pytest.raises(ValueError, match="found no low-rank bracket"):
        lro.distributed.traffic_report(tx, PARAMS)


def test_the_state_of_another_optimizer():
    with pytest.raises(ValueError, match=r"with 1 low-rank bracket.*one with 0"):
        lro.distributed.refresh_due(left(), optax.adam(1.0).init(PARAMS), PARAMS)


def test_parameters_spread_over_the_axis_itself():
    tx = left()
    gradient = lro.distributed.value_and_grad(loss, tx, axis_name="data")
    specs = (P("data"), P(), P("data"))
    step = jax.shard_map(
        lambda p, b: gradient(p, tx.init(p), b)[0],
        mesh=data_mesh(),
        in_specs=specs[::2],
        out_specs=P(),
    )
    params = {"w": jnp.ones((64, 32))}
    message = r"'w' is itself spread over 'data' \(each device has \(8, 32\)\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, {"w": jnp.ones((8, 8, 32))})


def test_gradients_that_are_summed_already():
    tx = left()

    def step(params, batch):
        grads = jax.grad(loss)(params, batch)  # without pcast
        return lro.distributed.pmean(grads, tx, tx.init(params), params, "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    mapped = jax.shard_map(step, mesh=data_mesh(), **specs)
    message = r"'dense', shape \(64, 32\), is the same on all devices of 'data' already"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped, PARAMS, examples(PARAMS))


def test_micro_batches_that_do_not_divide():
    step = make_step(left(), data_mesh(), micro_batches=3)
    message = r"micro_batches=3 must divide .* leaf 'dense' has shape \(2, 64, 32\)"
    with pytest.raises(ValueError, match=message):
        call(step)
    with pytest.raises(TypeError, match="`micro_batches` must be a positive int"):
        make_step(left(), micro_batches=True)


def test_accumulation_on_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    step = make_step(left(), micro_batches=2)
    with pytest.raises(ValueError, match=r"has the explicit axes \('data',\)"):
        call(step, params=params)
    # As the mapped axis it is manual, and no trouble.
    step = make_step(left(), mesh, micro_batches=2)
    rows = jax.device_put(examples(PARAMS), NamedSharding(mesh, P("data")))
    assert call(step, params=params, batch=rows)
