"""Small parameters, their layouts on 8 devices, and runs on one device or all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

AXES = ("data", "model")
RANK, GAP, STEPS = 4, 2, 5  # refreshes at steps 0, 2 and 4

# side="left" projects the long side of one matrix and the short side of the other.
PARAMS = {
    "dense": jnp.ones((64, 32)),
    "layers": {"bias": jnp.ones((2, 32)), "up": jnp.ones((2, 32, 64))},
    "norm": jnp.ones((16,)),
}

# FSDP over all devices, one axis of every leaf; tensor sharding over "model"; both.
LAYOUTS = {
    "fsdp": {
        "dense": P(AXES, None),
        "layers": {"bias": P(None, AXES), "up": P(None, None, AXES)},
        "norm": P(AXES),
    },
    "tensor": {
        "dense": P("model"),
        "layers": {"bias": P(), "up": P(None, None, "model")},
        "norm": P(),
    },
    "both": {
        "dense": P("model", "data"),
        "layers": {"bias": P(None, "data"), "up": P(None, "data", "model")},
        "norm": P("data"),
    },
}


def auto_mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), AXES)


def explicit_mesh():
    return jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2)


# Few cold sweeps: eight devices on a CPU take turns at every all-reduce.
PROJECTORS = {
    "power": lro.power(RANK, GAP, cold_sweeps=2),
    "svd": lro.svd(RANK, GAP),
}
MESHES = {"auto": auto_mesh, "explicit": explicit_mesh}


def named(mesh, specs):
    """Returns the specs as shardings on the mesh."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def galore(**options):
    """GaLore whose updates have size one, so that 1e-5 means 1e-5 of them.

    Adam divides a small projection by itself, so by its own rounding; an eps of 0.1,
    against projections of size 3 to 8, bounds that.
    """
    if "projector" not in options:  # which has a rank and a gap of its own
        options = {"rank": RANK, "update_proj_gap": GAP, **options}
    return lro.galore(1.0, scale=1.0, eps=0.1, **{"layer_axis": 0, **options})


def gradients(params, steps=STEPS):
    """Random gradients, the same for every layout.

    Matrices have four singular values well apart above a little noise: values a few
    per cent apart would turn the rounding of another order of summation into another
    basis.
    """

    def leaf(key, shape):
        noise = 1e-3 * jax.random.normal(key, shape)
        if len(shape) < 2 or min(shape[-2:]) < RANK:
            return 1e3 * noise
        left, right = jax.random.split(key)
        u = jnp.linalg.qr(jax.random.normal(left, (*shape[:-1], RANK)))[0]
        v = jax.random.normal(right, (*shape[:-2], RANK, shape[-1]))
        return u * jnp.array([8.0, 6.0, 4.5, 3.4]) @ v + noise

    def draw(step):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(step), len(leaves))
        new = [leaf(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        return treedef.unflatten(new)

    return [draw(step) for step in range(steps)]


def updates_on_one_device(tx, params):
    """Returns the updates of every step and the last state."""
    state, step, out = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients(params):
        update, state = step(gradient, state, params)
        out.append(update)
    return out, state


def assert_close(got, expected):
    """Asserts that updates of size one agree to 1e-5.

    Sums in another order differ by 1e-7; a basis multiplies that by the inverse
    distance of the singular values, and Adam by up to ten: see `galore`.
    """
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, expected
    )


class Sharded:
    """One optimizer with parameters and state laid out on a mesh."""

    def __init__(self, tx, params, shardings):
        """Places parameters and state, and compiles a step."""
        self.shardings = shardings
        self.params = jax.device_put(params, shardings)
        self.state_shardings = lro.state_shardings(tx, self.params, shardings)
        self.state = jax.jit(tx.init, out_shardings=self.state_shardings)(self.params)
        out = (shardings, self.state_shardings)
        self.compiled = (
            jax.jit(tx.update, out_shardings=out)
            .lower(self.params, self.state, self.params)
            .compile()
        )

    def updates(self, given):
        """Returns the updates of every step and the last state."""
        state, out = self.state, []
        for gradient in given:
            gradient = jax.device_put(gradient, self.shardings)
            update, state = self.compiled(gradient, state, self.params)
            out.append(update)
        return out, state

    def collectives(self):
        """Lists what the compiled step sends between devices."""
        return lro.collectives(self.compiled.as_text())


def per_device_bytes(tree):
    """Returns the bytes of a tree's arrays on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@functools.cache
def sharded(mesh, projector, side, layout):
    """Returns the optimizer on a mesh, compiled once for all tests of a process."""
    mesh = MESHES[mesh]()
    tx = galore(projector=PROJECTORS[projector], side=side)
    with jax.set_mesh(mesh):
        return Sharded(tx, PARAMS, named(mesh, LAYOUTS[layout]))
