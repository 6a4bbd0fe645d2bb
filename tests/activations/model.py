"""A small LLaMA-like block with tags, and a stack of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations

TAGS = ("norm1", "q", "k", "v", "attn", "h", "norm2", "gate", "up", "act")
# Little effort in the compiler of machine code: the program before that is the same.
QUICK = {"xla_backend_optimization_level": 0}
# Inside its fusions XLA may keep more than 16 bits, so that two programs with fusions
# of other extents round differently. Without that they must agree bit for bit.
STRICT = {"xla_allow_excess_precision": False, **QUICK}

PRODUCTS = ("q", "k", "v", "attn", "gate", "up")  # what matrix products made


def rms_norm(x, gain):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * gain


@jax.checkpoint
def attend(q, k, v):
    length = q.shape[1]
    score = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    score = jnp.where(jnp.tril(jnp.ones((length, length), bool)), score, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(score, -1), v)


def block(params, x, heads=4):
    def split(y):
        return y.reshape(*x.shape[:2], heads, -1)

    y = checkpoint_name(rms_norm(x, params["norm1"]), "norm1")
    q = checkpoint_name(split(y @ params["wq"]), "q")
    k = checkpoint_name(split(y @ params["wk"]), "k")
    v = checkpoint_name(split(y @ params["wv"]), "v")
    y = checkpoint_name(attend(q, k, v).reshape(x.shape), "attn")
    h = checkpoint_name(x + y @ params["wo"], "h")
    y = checkpoint_name(rms_norm(h, params["norm2"]), "norm2")
    gate = checkpoint_name(y @ params["wg"], "gate")
    up = checkpoint_name(y @ params["wu"], "up")
    return h + checkpoint_name(jax.nn.silu(gate) * up, "act") @ params["wd"]


def inputs(layers=2, width=32, ff=88, rows=2, length=16, dtype="float32", gain=1.0):
    """Stacked parameters and a batch; the first four norm gains are ``gain``."""
    rng = np.random.default_rng(0)

    def kernel(n, m):
        return (rng.standard_normal((layers, n, m)) * n**-0.5).astype(dtype)

    gains = np.ones((layers, width))
    gains[:, :4] = gain
    shapes = {name: (width, width) for name in ("wq", "wk", "wv", "wo")}
    shapes |= {"wg": (width, ff), "wu": (width, ff), "wd": (ff, width)}
    params = {name: kernel(*shape) for name, shape in shapes.items()}
    params |= {name: gains.astype(dtype) for name in ("norm1", "norm2")}
    x = rng.standard_normal((rows, length, width)).astype(dtype)
    return jax.tree.map(jnp.asarray, (params, x))


def loss(params, x, body, scan=True):
    if scan:
        x, _ = jax.lax.scan(lambda x, p: (body(p, x), None), x, params)
    else:
        for index in range(len(params["norm1"])):
            x = body(jax.tree.map(lambda p, at=index: p[at], params), x)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def step(body, scan=True):
    """A function of (params, x) that returns the loss and both gradients."""
    return lambda params, x: jax.value_and_grad(loss, (0, 1))(params, x, body, scan)


def compiled(body, arguments, scan=True, options=QUICK):
    return (
        jax.jit(step(body, scan), compiler_options=options).lower(*arguments).compile()
    )


def run(body, arguments, scan=True, options=QUICK):
    return compiled(body, arguments, scan, options)(*arguments)


def kept(action, tags=TAGS, fn=block, **options):
    """The block with one action for all of these tags."""
    return activations.compressed_checkpoint(fn, dict.fromkeys(tags, action), **options)


def assert_same(a, b):
    """Bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def flat(tree):
    return np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    )


def distance(got, exact):
    """The relative L2 distance of two trees."""
    got, exact = flat(got), flat(exact)
    return np.linalg.norm(got - exact) / np.linalg.norm(exact)
