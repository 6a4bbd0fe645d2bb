"""What computing again costs, from the jaxpr, and what rounding costs, from data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations
from lowrank_optax.activations.checkpoint.policy import TRANSFORMER_TAGS
from lowrank_optax.activations.checkpoint.program import trace
from lowrank_optax.activations.planner import milp, probes
from lowrank_optax.activations.planner.costs import _Replay
from tests.activations import model

ROWS, LENGTH, WIDTH, FF = 2, 16, 32, 88
TOKENS = ROWS * LENGTH


@functools.cache
def layer(gain=1.0):
    params, x = model.inputs(layers=1, rows=4, length=64, width=64, ff=176, gain=gain)
    return jax.tree.map(lambda p: p[0], params), x


def costs(fn=model.block, **options):
    params, x = model.inputs(1, WIDTH, FF, ROWS, LENGTH, **options)
    cost = activations.block_cost(fn, (jax.tree.map(lambda p: p[0], params), x))
    return cost, {tag.tag: tag for tag in cost.tags}


def test_every_tag_of_the_block_costs_its_own_product():
    cost, tags = costs()
    assert tuple(tags) == model.TAGS
    assert cost.input_bytes == 4 * TOKENS * WIDTH
    for tag in ("q", "k", "v", "h"):
        product = 2 * TOKENS * WIDTH * WIDTH
        assert product <= tags[tag].flops < 1.1 * product  # h: also the addition
        assert tags[tag].nbytes == 4 * TOKENS * WIDTH
    for tag in ("gate", "up"):
        assert tags[tag].flops == 2 * TOKENS * WIDTH * FF
        read = 4 * (TOKENS * WIDTH + WIDTH * FF)
        # The norm before the product is no tag of its own traffic: it is kept.
        assert tags[tag].traffic == read + 4 * TOKENS * FF
    for tag in ("norm1", "norm2", "act"):
        assert 0 < tags[tag].flops < 5 * TOKENS * FF
    assert tags["act"].traffic == 3 * 4 * TOKENS * FF
    users = {link.tag: {cost.links[k].tag for k in link.users} for link in cost.links}
    assert users["h"] == {"norm2"} and users["gate"] == {"act"}


def test_the_backward_pass_has_the_operations_that_xla_counts():
    """Unrolled and without tags, where XLA's own count is of every operation."""
    params, x = layer()
    cost = activations.block_cost(model.block, (params, x))
    quick = functools.partial(jax.jit, compiler_options=model.QUICK)
    forward = activations.audit(quick(model.block), (params, x)).flops

    def backward(params, x, g):
        return jax.vjp(functools.partial(model.block), params, x)[1](g)

    whole = activations.audit(quick(backward), (params, x, x)).flops
    assert forward is not None and whole is not None
    # Elementwise operations are counted a little otherwise: several per exponential.
    np.testing.assert_allclose(cost.forward_flops, forward, rtol=0.1)
    again = sum(tag.flops for tag in cost.tags)
    assert cost.backward_flops + again == pytest.approx(whole, rel=0.1)


def test_what_the_backward_pass_needs_anyway_is_no_cost_of_a_tag():
    def fn(w, x):
        hidden = jnp.tanh(x @ w)  # the derivative of tanh and dw need it
        return checkpoint_name(hidden @ w, "out") ** 2

    w, x = jnp.ones((32, 32)), jnp.ones((8, 32))
    (tag,) = activations.block_cost(fn, (w, x)).tags
    assert tag.flops == 2 * 8 * 32 * 32  # one product, not two


def test_a_tag_that_only_its_child_needs():
    def fn(w, x):
        proj = checkpoint_name(jnp.tanh(x) @ w, "proj")
        h = checkpoint_name(x + proj, "h")
        return h**2

    w, x = jnp.ones((32, 32)), jnp.ones((8, 32))
    proj, h = activations.block_cost(fn, (w, x)).tags
    assert proj.flops == 0
    assert 0 < h.flops < 3 * 8 * 32
    cost = activations.block_cost(fn, (w, x))
    assert [(link.always, link.users) for link in cost.links] == [
        (False, (1,)),
        (True, ()),
    ]
    (product,) = (run for run in cost.reruns if run.values == (0,))
    assert product.flops >= 2 * 8 * 32 * 32


def chain(w, x):
    """Projection, dropout, residual: each is only needed by the next."""
    out = checkpoint_name(jnp.tanh(x) @ w["o"], "out")
    drop = checkpoint_name(out * 0.5, "drop")
    h = checkpoint_name(x + drop, "h")
    return h + jnp.tanh(h) @ w["b"]


def gated(w, x):
    """One product, two pieces."""
    gate, up = jnp.split(x @ w["gu"], 2, -1)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up + 1.0, "up")
    return checkpoint_name(jax.nn.silu(gate) * up, "act") @ w["b"]


def shared_name(w, x):
    """Two values of one name, and one that is cut from two products."""
    a = checkpoint_name(x @ w["o"], "both")
    b = checkpoint_name(jnp.sin(x) @ w["b"], "both")
    return checkpoint_name(a * b, "product") ** 2 @ w["o"]


@pytest.mark.parametrize("fn", [chain, gated, shared_name, model.block])
def test_any_set_of_tags_is_priced_by_the_replay(fn):
    """Links and reruns add up to the operations that are needed, for every set."""
    d = 32
    w = {"o": jnp.ones((d, d)), "b": jnp.ones((d, d)), "gu": jnp.ones((d, 2 * d))}
    x = jnp.ones((8, d))
    if fn is model.block:
        params, x = model.inputs(1, WIDTH, FF, ROWS, LENGTH)
        w = jax.tree.map(lambda p: p[0], params)
    cost = activations.block_cost(fn, (w, x))
    program, flat = trace(fn, (w, x), {})
    tagged = [value for value in program.tagged if not value.inside]
    replay = _Replay(program, flat, tagged, len(jax.tree.leaves(x)))
    plain = activations.Hardware("plain", 1e3, 1e30, 1, 1, efficiency=1.0)
    actions = tuple(activations.parse_action(a) for a in ("save", "recompute"))
    errors = {(tag.tag, a): 0.0 for tag in cost.tags for a in actions}
    tables = milp.build(cost, actions, (1,), plain, errors, {})
    names = [tag.tag for tag in cost.tags]
    for kept in itertools.product((True, False), repeat=min(len(names), 6)):
        kept = [*kept, *[True] * (len(names) - len(kept))]
        gone = {name for name, keep in zip(names, kept, strict=True) if not keep}
        expected = replay.flops(gone) - replay.flops(())
        chosen = np.array([int(not keep) for keep in kept])
        assert tables.total(chosen[None])[1] == pytest.approx(expected)
        assert sum(tables.times(chosen)) == pytest.approx(expected)


def test_loops_calls_masks_keys_and_integers():
    def fn(w, x, key):
        @jax.jit
        def inner(x):
            return checkpoint_name(x @ w, "inside")

        x = inner(x)
        mask = checkpoint_name(x > 0, "mask")
        drop = checkpoint_name(jax.random.bernoulli(key, 0.9, x.shape), "drop")
        x, _ = jax.lax.scan(
            lambda x, _: (checkpoint_name(jnp.sin(x @ w), "hidden"), None), x, length=3
        )
        return checkpoint_name(jnp.where(mask & drop, x, 0), "out") @ w

    w, x = jnp.ones((32, 32)), jnp.ones((8, 32))
    found = activations.block_cost(fn, (w, x, jax.random.key(0)))
    tags = {tag.tag: tag for tag in found.tags}
    assert set(tags) == {"inside", "mask", "drop", "out"}  # not "hidden"
    assert tags["mask"].nbytes == 8 * 32
    assert tags["inside"].flops == 2 * 8 * 32 * 32
    # Three turns of the loop and two products.
    assert found.forward_flops > 5 * 2 * 8 * 32 * 32


@pytest.mark.parametrize("tokens", [8, 64])
def test_the_working_set_has_no_parameters_but_the_gradient_that_is_formed(tokens):
    found = activations.block_cost(
        lambda w, x: checkpoint_name(x @ w, "a") ** 2,
        (jnp.ones((32, 32)), jnp.ones((tokens, 32))),
    )
    # Where the gradient is formed, with both operands, or what it is formed from: the
    # input, the kept value and the cotangent.
    each = 4 * tokens * 32
    assert found.working_bytes == max(4 * 32 * 32 + 2 * each, 3 * each)


def test_fused_results_take_no_memory():
    params, x = layer()
    fused, written = (
        activations.block_cost(model.block, (params, x), fuses).working_bytes
        for fuses in (True, False)
    )
    assert fused < written


ACTIONS = tuple(
    activations.parse_action(a, 64)
    for a in ("save", "recompute", "int8", "int4", "int4+4")
)


@functools.cache
def probed(gain):
    return activations.probe_errors(model.block, layer(gain), ACTIONS)


def test_a_probe_is_the_error_of_the_block_under_that_policy():
    params, x = layer()
    key = jax.random.split(jax.random.key(0), 1)[0]
    r = jax.random.normal(key, x.shape)

    def gradient(fn):
        def pull(p, x):
            return jax.vjp(fn, p, x)[1](r)

        return jax.jit(pull, compiler_options=model.QUICK)(params, x)

    exact = gradient(model.block)
    _, _, int8, int4, _ = ACTIONS
    got = gradient(activations.compressed_checkpoint(model.block, {"gate": int4}))
    own, below = map(model.distance, got, exact)
    assert own > 0.01 and below > 0.01
    errors = probed(1.0)
    # Float32 rounding of two programs, against errors of a few per cent.
    assert errors["gate", int4] == pytest.approx(own, rel=1e-3)
    assert errors["gate", ACTIONS[0]] == errors["gate", ACTIONS[1]] == 0
    # 127 steps against 7.
    assert errors["gate", int8] == pytest.approx(errors["gate", int4] / 18, rel=0.5)
    # The layers below see what comes out of it; a cotangent may be given.
    stack = activations.probe_errors(
        model.block, (params, x), [int4], cotangent=r, n_layers=5
    )
    expected = (own**2 + 2 * below**2) ** 0.5
    assert stack["gate", int4] == pytest.approx(expected, rel=1e-3)


def test_a_block_without_parameters_is_probed_at_its_input():
    def block(params, x):
        return jnp.sin(checkpoint_name(x, "a"))

    x = jax.random.normal(jax.random.key(0), (8, 64))
    errors = activations.probe_errors(block, ((), x), ACTIONS)
    assert 0.01 < errors["a", ACTIONS[3]] < 0.3


def test_outliers_in_norms_need_their_channels():
    errors = probed(12.0)
    for tag in ("norm1", "norm2"):
        assert errors[tag, ACTIONS[4]] < errors[tag, ACTIONS[3]] / 3


@pytest.mark.parametrize("gain", [1.0, 12.0])
def test_errors_by_role_are_on_the_safe_side(gain):
    errors = probed(gain)
    int4 = ACTIONS[3]
    for tag in model.TAGS:
        role = TRANSFORMER_TAGS[tag]
        # A tenth of slack: the table is rounded, and other shapes were probed.
        assert probes.error_of_role(role, int4, 64) > 0.9 * errors[tag, int4], tag


def test_probes_of_any_scale():
    def block(w, x):
        return checkpoint_name(x @ w, "a") ** 2

    for scale in (1e-20, 1.0, 1e15):
        args = jnp.eye(64), scale * jax.random.normal(jax.random.key(0), (8, 64))
        errors = activations.probe_errors(block, args, ACTIONS)
        assert 0.01 < errors["a", ACTIONS[3]] < 0.3


def test_a_gradient_that_says_nothing():
    def block(w, x):
        return checkpoint_name(x * w, "a") ** 2

    for x, word in ((jnp.zeros((8, 64)), "zero"), (jnp.full((8, 64), jnp.nan), "not")):
        with pytest.raises(ValueError, match=f"`example_args`, which is {word}"):
            activations.probe_errors(block, (x, x), ACTIONS)
