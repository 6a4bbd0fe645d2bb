"""Bases in four bits, and matrices that are refreshed the less the less they move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import quantization
from lowrank_optax.quantization import QuantizedArray, affine, dequantize
from lowrank_optax.testing import assert_projector_laws
from tests.quantization.recorded import GROUPS

M, N, RANK = 32, 48, 4
RECORDED = [
    kind for kind in ("slow", "random", "signflip") if f"trace_{kind}_G" in GROUPS
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def steady(seed):
    """A leading direction that stays, among noise."""
    direction = 3 * normal(98, M, 1) @ normal(99, 1, N) / M**0.5
    return direction + 0.3 * normal(seed, M, N)


def bracket(projector, inner=None, **options):
    options = {"select": ".*", **options}
    return lro.chain(
        lro.project(projector, **options), inner or optax.identity(), lro.backproject()
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Counting(lro.svd):
    """Notes the layer whenever a basis is really computed."""

    log: list = dataclasses.field(default_factory=list)

    def compute(self, matrix, gradient, old, at):
        jax.debug.callback(lambda layer: self.log.append(int(layer)), at.layer)
        return super().compute(matrix, gradient, old, at)


def run(tx, log, gradients):
    """Returns which layers were factorized at every step, and the last state."""
    gradients = list(gradients)
    state, update, computed = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        _, state = update(gradient, state)
        jax.effects_barrier()
        computed.append(sorted(log))
        log.clear()
    return computed, state


@pytest.mark.parametrize("kind", RECORDED or [pytest.param("", marks=pytest.mark.skip)])
def test_the_recorded_gaps_codes_and_projections(kind):
    """Needs GOLDEN_DIR: the gradients are too many for the repository."""
    projector = lro.quantize_basis(lro.svd(RANK, 2), affine(4, 64, "flat"))
    projector = lro.lazy(projector, largest_gap=2**30)
    tx = bracket(projector, side="short", transport=lro.keep_moments())
    recorded = {
        name: GROUPS[f"trace_{kind}_{name}"]
        for name in ("G", "gap", "svd_count", "queue", "back", "codes")
    }
    state, update, refreshes = tx.init(jnp.zeros((M, N))), jax.jit(tx.update), 0
    for step, gradient in enumerate(recorded["G"]):
        refreshes += step % int(state.basis.gap) == 0
        lifted, state = update(gradient, state)
        assert int(state.basis.gap) == recorded["gap"][step]
        assert refreshes == recorded["svd_count"][step]
        back = recorded["back"][step]
        # Float32 rounding of an SVD, and of products.
        error = np.abs(0.25 * lifted - back).max() / np.abs(back).max()
        codes = np.asarray(state.basis.vectors.codes).reshape(-1, 32)
        codes = np.concatenate([codes & 15, codes >> 4], -1)
        differing = np.mean(codes != recorded["codes"][step])
        # A code may fall on either side of a border, and is then worth half a step.
        assert differing <= 1 / 64
        assert error < (1e-5 if differing == 0 else 0.02)
        queue = np.abs(recorded["queue"][step])
        if step >= 10:  # full from there on
            # The old vector has the error of four bits, and cosines of 0.1 and less
            # are differences of large numbers.
            np.testing.assert_allclose(state.basis.similarities, queue, atol=0.05)


def test_a_steady_matrix_is_refreshed_less_and_less():
    gap, log = 2, []
    projector = lro.lazy(Counting(RANK, gap, log=log), largest_gap=16)
    computed, state = run(bracket(projector), log, map(steady, range(49)))
    refreshed = [step for step, layers in enumerate(computed) if layers]
    assert refreshed == [0, 2, 4, 6, 8, 10, 12, 16, 32, 48]
    assert int(state.basis.gap) == 16


def test_the_default_bound_is_sixteen_gaps():
    assert lro.lazy(lro.svd(2, 3)).largest_gap == 48


@pytest.mark.parametrize("make", [lro.svd, lro.power])
def test_noise_is_refreshed_at_every_gap(make):
    """Also where a basis is found from the old one, and so is always near it."""
    tx = bracket(lro.lazy(make(RANK, 1)))
    _, state = run(tx, [], (normal(seed, M, N) for seed in range(12)))
    assert int(state.basis.gap) == 1
    assert np.all(state.basis.similarities >= 0)
    _, state = run(tx, [], map(steady, range(12)))
    assert int(state.basis.gap) > 1


def test_the_sign_of_a_direction_does_not_matter():
    tx = bracket(lro.lazy(lro.svd(RANK, 1)), transport=lro.keep_moments())
    _, state = run(tx, [], ((-1) ** seed * steady(seed) for seed in range(8)))
    assert np.all(state.basis.similarities > 0.9)


def test_every_layer_has_a_gap_of_its_own():
    log = []
    tx = bracket(lro.lazy(Counting(RANK, 1, log=log)), layer_axis=0)
    gradients = (jnp.stack([steady(s), normal(s, M, N)]) for s in range(9))
    computed, state = run(tx, log, gradients)
    assert state.basis.gap.tolist() == [8, 1]
    assert computed == [[0, 1]] * 7 + [[1], [0, 1]]


def test_a_failed_refresh_is_made_up_for_and_not_compared():
    tx = bracket(lro.lazy(lro.svd(RANK, 3)))
    gradients = [steady(seed) for seed in range(6)]
    gradients[3] = jnp.full((M, N), jnp.nan)
    _, state = run(tx, [], gradients)
    assert not bool(state.pending)
    assert state.basis.similarities.tolist() == [-1.0] * 5
    _, state = run(tx, [], [*gradients, steady(6)])
    assert np.sum(state.basis.similarities >= 0) == 1


def test_what_is_used_is_what_is_stored():
    """Signs are chosen before the basis is encoded, which keeps it exact."""
    codec = affine(4, 8)
    tx = bracket(lro.quantize_basis(lro.svd(RANK, 1), codec), side="left")
    plain = bracket(lro.svd(RANK, 1), side="left")
    gradients = [steady(0), -steady(1) + normal(2, M, N)]
    _, state = run(tx, [], gradients)
    _, exact = run(plain, [], gradients)
    np.testing.assert_array_equal(state.basis.codes, codec.encode(exact.basis).codes)
    basis = state.basis.decode()
    assert 0 < np.abs(basis - exact.basis).max() <= np.ptp(exact.basis) / 15
    lifted, _ = jax.jit(tx.update)(gradients[1], state)
    want = np.float64(basis) @ (np.float64(basis).T @ np.float64(gradients[1]))
    np.testing.assert_allclose(lifted, want, rtol=1e-5, atol=1e-5)


def test_a_basis_that_fails_is_not_stored_as_zeros():
    """A codec turns NaN into 0, so the check must come before it."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Failing(lro.OrthonormalProjector):
        def compute(self, matrix, gradient, old, at):
            return jnp.where(at.epoch == 1, jnp.nan, old)

    tx = bracket(lro.quantize_basis(Failing(RANK, 1)))
    _, first = run(tx, [], [steady(0)])
    _, second = run(tx, [], [steady(0), steady(1)])
    assert bool(second.pending)
    jax.tree.map(np.testing.assert_array_equal, first.basis, second.basis)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_moments_rotate_with_a_quantized_basis(side):
    """After a refresh they are those of the run with a float basis, up to the codec."""

    def moment(projector):
        transport = lro.rotate_moments()
        tx = bracket(projector, optax.trace(0.9), side=side, transport=transport)
        _, state = run(tx, [], map(steady, range(3)))
        return np.asarray(state.inner_state.trace)

    # Eight bits: what is left is the codec's error, and not another rotation.
    coded = moment(lro.quantize_basis(lro.svd(RANK, 2), affine(8)))
    want = moment(lro.svd(RANK, 2))
    assert np.linalg.norm(coded - want) < 0.02 * np.linalg.norm(want)
    kept = np.asarray(
        run(
            bracket(lro.svd(RANK, 2), optax.trace(0.9), side=side),
            [],
            map(steady, range(3)),
        )[1].inner_state.trace
    )
    assert np.linalg.norm(kept - want) > 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("rank", [5, 64, 300])
def test_state_bytes(rank):
    shapes = {"w": jnp.zeros((512, 1024)), "stack": jnp.zeros((3, 600, 700))}
    tx = lro.q_galore(1e-2, rank=rank, layer_axis=0)
    state, table = jax.jit(tx.init)(shapes), lro.state_bytes(tx, shapes)
    assert table.total == sum(x.nbytes for x in jax.tree.leaves(state))
    groups, packed = -(-rank // 256), -(-rank // 2)
    for name, rows, layers in (("w", 512, 1), ("stack", 600, 3)):
        # Codes, five bytes per group, five cosines and the gap; and a flag.
        one = rows * (packed + 5 * groups) + 4 * 5 + 4
        assert table.entries[name, "basis"] == layers * one
        assert table.entries[name, "other"] == layers


def test_projector_laws():
    # The projector inside stands under its laws on every shape by itself.
    projector = lro.lazy(lro.quantize_basis(lro.power(3)))
    assert_projector_laws(projector, shapes=[(1, 1), (3, 40)])


def test_q_galore_is_its_composition():
    params = {"w": jnp.zeros((64, 128))}
    tx = lro.q_galore(1e-2, rank=48, update_proj_gap=2, weight_decay=0.1)
    parts = lro.galore_8bit(
        1e-2,
        projector=lro.lazy(lro.quantize_basis(lro.power(48, 2), affine(4, 256))),
        weight_decay=0.1,
    )
    state, same = tx.init(params), parts.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(same)
    for seed in range(3):
        gradient = {"w": normal(seed, 64, 128)}
        got, state = jax.jit(tx.update)(gradient, state, params)
        want, same = jax.jit(parts.update)(gradient, same, params)
        np.testing.assert_array_equal(got["w"], want["w"])
    basis = optax.tree_utils.tree_get(state, "basis")["w"]
    assert isinstance(basis.vectors, QuantizedArray)
    assert isinstance(optax.tree_utils.tree_get(state, "mu")["w"], QuantizedArray)


def test_authors_conventions():
    """SVD, its signs, groups over the whole basis, no bound of the gap."""
    tx = lro.q_galore(1e-2, RANK, update_proj_gap=1, conventions="authors", min_size=0)
    state = tx.init({"w": jnp.zeros((M, N))})
    vectors = optax.tree_utils.tree_get(state, "basis")["w"].vectors
    assert vectors.codec == quantization.affine(4, 256, "flat")
    _, state = run(tx, [], ({"w": steady(seed)} for seed in range(40)))
    assert int(optax.tree_utils.tree_get(state, "gap")) >= 32
    basis = np.asarray(dequantize(optax.tree_utils.tree_get(state, "vectors")))
    u = np.linalg.svd(np.float64(steady(32)))[0][:, 0]
    assert abs(u @ basis[:, 0]) > 0.98


def test_bad_input():
    with pytest.raises(TypeError, match=r"quantize_basis expected a projector.*int"):
        lro.quantize_basis(8)
    with pytest.raises(TypeError, match="affine"):
        lro.quantize_basis(lro.svd(2), jnp.int8)
    with pytest.raises(ValueError, match=r"lro\.online_pca does not"):
        lro.quantize_basis(lro.online_pca(2))
    with pytest.raises(ValueError, match=r"lro\.gaussian does not"):
        lro.lazy(lro.gaussian(2))
    with pytest.raises(ValueError, match=r"lro\.dct does not"):
        lro.lazy(lro.quantize_basis(lro.dct(2)))
    with pytest.raises(ValueError, match=r"`largest_gap` must be at least 200"):
        lro.lazy(lro.svd(2), largest_gap=100)
    with pytest.raises(ValueError, match=r"`factor` must be at least 2"):
        lro.lazy(lro.svd(2), factor=1)
    with pytest.raises(TypeError, match="history"):
        lro.lazy(lro.svd(2), history=2.5)
    with pytest.raises(ValueError, match="`bits`"):
        lro.q_galore(1e-2, basis_bits=3)
