"""Equations are evaluated one by one, on every version of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations
from lowrank_optax.activations.checkpoint.program import trace


@jax.custom_jvp
def own_jvp(x):
    return jnp.sin(x)


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), 5.0 * tangents[0]))


@jax.custom_vjp
def own_vjp(x, y):
    return x * y


own_vjp.defvjp(lambda x, y: (x * y, (x, y)), lambda saved, g: (3.0 * g, 4.0 * g))

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)

# One of each kind of equation: those with functions among their parameters are bound in
# their own ways, and JAX has changed these ways.
KINDS = {
    "several results": lambda x: jax.lax.top_k(x, 2)[0],
    "an unused result": lambda x: jnp.linalg.qr(x.T)[1],
    "the same operand twice": lambda x: x * x,
    "a literal": lambda x: 2.0 * x + 1,
    "jit": jax.jit(lambda x: jnp.cos(x)),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
    "scan": lambda x: jax.lax.scan(lambda c, r: (c + r, c * r), x[0], x)[1],
    "while": lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x + i, x),
    "cond": lambda x: jax.lax.cond(x[0, 0] < 0, jnp.sin, jnp.cos, x),
    "custom jvp": own_jvp,
    "relu": jax.nn.relu,
    "custom vjp": lambda x: own_vjp(x, 2 * x),
    "no operand": lambda x: x + jax.lax.iota(jnp.float32, 4),
    "random": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "closed-over array": lambda x: x + np.arange(4.0, dtype=np.float32),
    "identity": lambda x: x,
}


def differentiable(name):
    return name not in ("while", "several results")


@pytest.mark.parametrize("name", KINDS)
def test_an_equation_of_every_kind(name):
    """Values and, by JAX's own rules, derivatives."""
    fn = KINDS[name]
    program, flat = trace(fn, (X,), {})

    def again(x):
        (out,) = program([*flat[:-1], x])
        return out

    np.testing.assert_allclose(again(X), fn(X), rtol=1e-6)
    if differentiable(name):
        got, exact = (jax.grad(lambda x, f=f: f(x).sum())(X) for f in (again, fn))
        np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-7)


def test_own_derivatives_differ_from_those_of_what_they_call():
    """So that the test above sees when a rule is lost."""
    assert (jax.grad(lambda x: own_jvp(x).sum())(X) == 5.0).all()
    assert (jax.grad(lambda x: own_vjp(x, 2 * x).sum())(X) == 11.0).all()


def test_the_context_of_an_equation_is_kept():
    """Here the metadata that a context manager attaches."""
    from jax.experimental.xla_metadata import set_xla_metadata

    def fn(x):
        with set_xla_metadata(group="mine"):
            return checkpoint_name(jnp.sin(x), "x")

    wrapped = activations.compressed_checkpoint(fn, {"x": "save"})
    assert 'group = "mine"' in jax.jit(wrapped).lower(X).as_text()


def test_tags_are_listed_in_the_order_of_evaluation():
    @jax.jit
    def inner(x):
        return checkpoint_name(x[:2], "b") * 2

    def fn(x, pair):
        x = inner(checkpoint_name(x, "a"))
        x = x + checkpoint_name(pair, "p")["one"]  # a tree: one value per leaf
        hidden = jax.lax.map(lambda r: checkpoint_name(r, "b"), x)
        return inner(x).sum() + hidden.sum()

    shapes = (
        jax.ShapeDtypeStruct((3, 4), jnp.bfloat16),
        {"one": jax.ShapeDtypeStruct((4,), jnp.float32), "two": jnp.arange(2)},
    )
    found = activations.tagged_values(fn, *shapes)
    assert [(v.tag, v.index, v.shape, v.dtype.name, v.inside) for v in found] == [
        ("a", 0, (3, 4), "bfloat16", ""),
        ("b", 0, (2, 4), "bfloat16", ""),
        ("p", 0, (4,), "float32", ""),
        ("p", 1, (2,), "int32", ""),
        ("b", 0, (4,), "float32", "scan"),
        ("b", 1, (2, 4), "float32", ""),
    ]


def test_what_is_said_of_a_tag_counts():
    """`on_tag` sees every value once, in order, and its result goes on."""

    def fn(x):
        x = checkpoint_name(x + 1, "a")
        x = jax.jit(lambda x: checkpoint_name(2 * x, "a"))(x)
        return jnp.sum(x)

    program, flat = trace(fn, (jnp.zeros(3),), {})
    seen = []

    def on_tag(tag, index, value):
        seen.append((tag, index, value.tolist()))
        return value + 10

    (out,) = program(flat, on_tag)
    assert seen == [("a", 0, [1.0] * 3), ("a", 1, [22.0] * 3)]
    assert out == 96
