"""Under other transformations, with arguments and results of all kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from lowrank_optax import activations
from tests.activations.model import QUICK, assert_same, distance

compress = activations.compressed_checkpoint
quick = functools.partial(jax.jit, compiler_options=QUICK)

W = jnp.asarray(np.random.default_rng(1).standard_normal((24, 24)) / 5, jnp.float32)
X = jnp.asarray(np.random.default_rng(2).standard_normal((6, 24)), jnp.float32)


def layer(w, x):
    return jnp.tanh(checkpoint_name(x @ w, "y"))


def total(fn):
    return lambda *args, **kwargs: jnp.sum(jnp.square(fn(*args, **kwargs)))


def assert_close(got, exact):
    """Equal but for the order of summation, which other fusions change."""
    assert distance(got, exact) < 1e-5


def same_gradients(fn, *args, policy=None, argnums=0, **kwargs):
    """ "Save", or an exact policy, is the plain gradient; codes come close to it."""
    exact = quick(jax.grad(total(fn), argnums))(*args, **kwargs)

    def under(policy):
        body = compress(fn, policy)
        return quick(jax.grad(total(body), argnums))(*args, **kwargs)

    assert_close(under(policy or {"y": "save"}), exact)
    if policy is None:
        assert 1e-5 < distance(under({"y": "int8"}), exact) < 0.03
    return exact


def test_with_and_without_jit():
    same_gradients(layer, W, X, argnums=(0, 1))
    body = compress(layer, {"y": "int8"})
    eager = jax.grad(total(body))(W, X)
    assert distance(eager, quick(jax.grad(total(body)))(W, X)) < 1e-5


def test_vmap_over_the_batch():
    """A row's gradient is the same alone and in a batch: groups lie within rows."""
    body = compress(layer, {"y": "int4"}, group=8)
    gradient = jax.grad(total(body), (0, 1))
    together = quick(jax.vmap(gradient, (None, 0)))(W, X)
    single = quick(gradient)
    alone = [single(W, x) for x in X]
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *alone)
    assert distance(together, stacked) < 1e-5
    mapped = jax.grad(lambda w: total(jax.vmap(body, (None, 0)))(w, X))
    assert distance(quick(mapped)(W), together[0].sum(0)) < 1e-5


def test_gradients_flow_to_what_is_closed_over():
    def gradients(action):
        def outer(w, scale):
            def inner(x):
                return scale * layer(w, x)

            fn = inner if action == "plain" else compress(inner, {"y": action})
            return jnp.sum(fn(fn(X)) ** 2)

        return quick(jax.grad(outer, (0, 1)))(W, 1.5)

    plain, save, int8 = map(gradients, ("plain", "save", "int8"))
    assert_close(save, plain)
    assert 1e-5 < distance(int8, plain) < 0.03


def test_a_scan_whose_body_closes_over_tracers():
    def stack(w, shared, body):
        def step(x, w):
            return body(lambda x: layer(w + shared, x))(x), None

        return jnp.sum(jax.lax.scan(step, X, w)[0] ** 2)

    w = jnp.stack([W, W.T])
    save = functools.partial(compress, policy={"y": "save"})
    gradient = quick(jax.grad(stack, (0, 1)), static_argnums=2)
    exact, got = gradient(w, 0.1 * W, lambda fn: fn), gradient(w, 0.1 * W, save)
    assert_close(got, exact)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
def test_random_numbers_from_keys_among_the_arguments(key):
    """Both runs drop the same entries; keys and integers have no gradients."""

    def dropped(w, x, key, rows):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        y = layer(w, jnp.where(keep, x, 0.0))[rows]
        return checkpoint_name(y, "z")

    rows = jnp.array([0, 2, 2, 5])
    exact = same_gradients(dropped, W, X, key, rows)
    body = compress(dropped, {"y": "save", "z": "int8"})
    again = quick(jax.grad(total(body), allow_int=True, argnums=(0, 3)))
    got, of_integers = again(W, X, key, rows)
    assert distance(got, exact) < 0.02
    assert of_integers.dtype == jax.dtypes.float0


def test_keys_are_scanned_over():
    def body(x, key):
        noise = jax.random.normal(key, x.shape)
        return layer(W, x + noise), None

    def stack(x, wrap):
        return jnp.sum(jax.lax.scan(wrap(body), x, keys)[0] ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    save = functools.partial(compress, policy={"y": "save"})
    gradient = quick(jax.grad(stack), static_argnums=1)
    exact, got = gradient(X, lambda fn: fn), gradient(X, save)
    assert_close(got, exact)


def test_pytrees_keywords_and_results_that_are_no_floats():
    def fn(tree, *, other, none=None):
        y = layer(tree["w"], other[0])
        return {"y": y, "best": jnp.argmax(y), "none": none, "two": 2 * other[1]}

    def scalar(fn):
        def value(w):
            out = fn({"w": w, "unused": None}, other=(X, 2.0))
            assert out["none"] is None
            return jnp.sum(out["y"] ** 2) * out["two"], out["best"]

        return value

    def gradient(fn):
        return quick(jax.value_and_grad(scalar(fn), has_aux=True))(W)

    (value, best), exact = gradient(fn)
    (kept_value, kept_best), got = gradient(compress(fn, {"y": "save"}))
    assert_same((kept_value, kept_best), (value, best))
    assert_close(got, exact)


def test_a_tag_that_occurs_several_times():
    """Every occurrence has its own codes: the first two have unlike values."""

    def twice(w, x):
        return layer(w.T, 3 * layer(w, x)) + layer(w, 0.1 * x)

    found = activations.tagged_values(twice, W, X)
    assert [(v.tag, v.index) for v in found] == [("y", 0), ("y", 1), ("y", 2)]
    same_gradients(twice, W, X)


def test_a_tag_on_what_has_no_gradient():
    """Kept as it is, and no gradient goes there."""

    def masked(w, x):
        mask = checkpoint_name(x > 0, "mask")
        index = checkpoint_name(jnp.argsort(x, axis=-1), "index")
        return layer(w, jnp.take_along_axis(jnp.where(mask, x, 0), index, -1))

    policy = {"mask": "int4", "index": "int8", "y": "save"}
    exact = same_gradients(masked, W, X, policy=policy)
    body = compress(masked, policy, stochastic=True)
    got = quick(jax.grad(total(body)))(W, X)
    assert_close(got, exact)


def test_tags_inside_jitted_functions():
    inner = jax.jit(lambda w, x: layer(w, x))

    def outer(w, x):
        return jax.jit(lambda w, x: inner(w, inner(w, x)))(w, x)

    same_gradients(outer, W, X)


def test_functions_with_derivatives_of_their_own_keep_them():
    @jax.custom_vjp
    def odd(x):
        return x

    odd.defvjp(lambda x: (x, None), lambda _, g: (7.0 * g,))

    def fn(w, x):
        return odd(jax.nn.relu(layer(w, x)))

    exact = same_gradients(fn, W, X)
    plain = quick(jax.grad(lambda w: jnp.sum(jax.nn.relu(layer(w, X)) ** 2)))(W)
    assert distance(exact, 7 * plain) < 1e-5


def test_a_checkpoint_inside_stays_one():
    def fn(w, x):
        core = jax.checkpoint(lambda y: jnp.sin(checkpoint_name(jnp.sin(y), "inner")))
        return core(layer(w, x))

    same_gradients(fn, W, X)
    text = str(jax.make_jaxpr(jax.grad(total(compress(fn, {"y": "int8"}))))(W, X))
    assert "remat" in text or "checkpoint" in text
    with pytest.raises(ValueError, match=r"'inner'.* inside a `checkpoint`"):
        compress(fn, {"inner": "save"})(W, X)


@pytest.mark.parametrize("kind", ["scan", "while", "cond"])
def test_a_tag_inside_a_loop_or_a_branch_is_an_error_unless_recomputed(kind):
    def scan(w, x):
        return jax.lax.scan(lambda x, _: (layer(w, x), None), x, length=2)[0]

    def loop(w, x):
        return jax.lax.while_loop(lambda x: x.sum() > 9, lambda x: layer(w, x), x)

    def branch(w, x):
        return jax.lax.cond(x.sum() > 0, layer, lambda w, x: x, w, x)

    fn = {"scan": scan, "while": loop, "cond": branch}[kind]
    with pytest.raises(ValueError, match=f"'y'.* inside a `{kind}`.*Wrap the func"):
        compress(fn, {"y": "int8"})(W, X)
    (found,) = activations.tagged_values(fn, W, X)
    assert found.inside == kind
    assert_same(compress(fn, {"y": "recompute"})(W, X), fn(W, X))
    if kind != "while":
        same_gradients(fn, W, X, policy={"y": "recompute"})


def test_a_compressed_function_inside_a_scan_inside_one():
    """The way out that the error names."""

    def scan(w, x):
        body = compress(layer, {"y": "save"})
        return jax.lax.scan(lambda x, _: (body(w, x), None), x, length=3)[0]

    def fn(w, x):
        return checkpoint_name(scan(w, x), "z")

    same_gradients(fn, W, X, policy={"z": "save"})


def test_the_second_derivative():
    """The derivative of the replay, in which codes count as constants."""

    def second(fn):
        def directional(w):
            return jnp.sum(jnp.sin(W) * jax.grad(total(fn))(w, X))

        return quick(jax.grad(directional))(W)

    exact = second(layer)
    assert_close(second(compress(layer, {"y": "save"})), exact)
    assert 1e-4 < distance(second(compress(layer, {"y": "int8"})), exact) < 0.05


def test_forward_mode_is_refused():
    body = compress(layer, {"y": "save"})
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(body, (W, X), (W, X))


def test_names_of_scopes_reach_the_compiled_program():
    def fn(w, x):
        with jax.named_scope("my_scope"):
            return layer(w, x)

    step = quick(jax.grad(total(compress(fn, {"y": "int8"}))))
    text = step.lower(W, X).as_text(debug_info=True)
    for name in ("my_scope", "activations/compress", "activations/decompress"):
        assert name in text


def barriers(jaxpr):
    """The shapes and dtypes behind every barrier of a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier":
            yield sorted(str(var.aval) for var in eqn.invars)
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from barriers(sub)


def test_compression_is_not_put_off_and_the_replay_not_merged():
    """A barrier forward around results and codes; one backward around arguments, codes
    and cotangents. On a TPU unrolled layers save nothing without them; on a CPU no
    byte shows it."""
    body = compress(layer, {"y": "int8"}, group=24)
    gradient = jax.make_jaxpr(jax.grad(total(body), (0, 1)))(W, X)
    arguments = ["float32[24,24]", "float32[6,24]"]
    codes, result = ["uint8[6,24]", "bfloat16[6,1]"], ["float32[6,24]"]
    assert list(barriers(gradient.jaxpr)) == [
        sorted(result + codes),
        sorted(arguments + codes + result),
    ]


def test_what_is_offloaded_has_no_barrier():
    """On a TPU a barrier fetches it from the host and holds it on the device."""
    body = compress(layer, {"y": "offload"})
    gradient = jax.make_jaxpr(jax.grad(total(body), (0, 1)))(W, X)
    forward, backward = barriers(gradient.jaxpr)
    assert forward == ["float32[6,24]"]  # the result
    assert len(backward) == 3  # the arguments and the cotangent
