"""Cosine bases: the matrices, the choice of columns, the gather, DCT-AdamW."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

import lowrank_optax as lro
from lowrank_optax.linalg.dct import LARGEST, dct_columns, dct_matrix
from lowrank_optax.testing import (
    assert_bit_equal,
    assert_orthonormal,
    assert_projector_laws,
)
from tests.distributed.cases import (
    LAYOUTS,
    PARAMS,
    Sharded,
    assert_close,
    explicit_mesh,
    gradients,
    named,
    updates_on_one_device,
)
from tests.golden import cases
from tests.golden.dct import choices

KINDS = ("dct3", "dct2")
kinds = pytest.mark.parametrize("kind", KINDS)
norms = pytest.mark.parametrize("norm", [1, 2])

# Entries of D are at most sqrt(2 / n); float32 rounds the cosine, the root and their
# product, and the angle below 45 degrees: 2^-24 each.
ROUNDING = 4 * 2.0**-24

columns_of: Any = jax.jit(dct_columns, static_argnums=(0, 2, 3))
matrix_of: Any = jax.jit(dct_matrix, static_argnums=(0, 1, 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(n, indices, kind):
    """Columns of D in float64, from angles reduced in integers."""
    rows, columns = np.arange(n)[:, None], np.asarray(indices)[None, :]
    frequency, sample = (rows, columns) if kind == "dct3" else (columns, rows)
    angle = frequency.astype(object) * (2 * sample.astype(object) + 1) % (4 * n)
    cosine = np.cos(np.pi * angle.astype(np.float64) / (2 * n))
    return np.sqrt(np.where(frequency == 0, 1, 2) / n) * cosine


# The matrices.


def test_the_matrix_is_orthogonal_and_kinds_are_transposes():
    both = jax.jit(lambda n: [dct_matrix(n, kind) for kind in KINDS], static_argnums=0)
    for n in [*range(1, 18), 31, 32, 33, 47, 48, 63, 64]:
        q, transposed = both(n)
        assert_bit_equal(q, transposed.T)
        wide = np.asarray(q, np.float64)
        # n products of two entries, each off by the rounding above.
        np.testing.assert_allclose(wide @ wide.T, np.eye(n), atol=4 * ROUNDING)
        np.testing.assert_allclose(wide.T @ wide, np.eye(n), atol=4 * ROUNDING)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_scipys_transforms(n):
    x = normal(0, n, 5).astype(np.float64)
    with jax.enable_x64(True):
        q2, q3 = (np.asarray(dct_matrix(n, kind, jnp.float64)) for kind in KINDS[::-1])
    for basis, transform in ((q2, scipy.fft.dct), (q3, scipy.fft.idct)):
        expected: Any = transform(x, axis=0, norm="ortho")
        np.testing.assert_allclose(basis.T @ x, expected, atol=1e-14 * n)


@kinds
@pytest.mark.parametrize("n", [4096, 100_003, LARGEST])
def test_columns_of_large_matrices(n, kind):
    """i (2 j + 1) exceeds 32 bits from n = 46341 on."""
    indices = np.array([0, 1, 2, n // 3, n // 2, n - 2, n - 1], np.int32)
    found = columns_of(n, jnp.asarray(indices), kind, jnp.float32)
    want = exact(n, indices, kind) if n < LARGEST else _some_rows(n, indices, kind)
    rows = slice(None) if n < LARGEST else slice(-1000, None)
    bound = ROUNDING * np.sqrt(2 / n)
    np.testing.assert_allclose(np.asarray(found)[rows], want, rtol=0, atol=bound)
    # Sums of n products; the norm of a column is 1.
    assert_orthonormal(found, atol=1e-6)


def _some_rows(n, indices, kind):
    rows, columns = np.arange(n - 1000, n)[:, None], indices[None, :].astype(np.int64)
    frequency, sample = (rows, columns) if kind == "dct3" else (columns, rows)
    angle = frequency * (2 * sample + 1) % (4 * n)  # below 2^63
    return np.sqrt(np.where(frequency == 0, 1, 2) / n) * np.cos(np.pi * angle / (2 * n))


def test_longer_sides_are_refused():
    with pytest.raises(ValueError, match="project the other side"):
        jax.eval_shape(functools.partial(dct_columns, LARGEST + 1), jnp.arange(2))


@kinds
def test_columns_are_those_of_the_matrix(kind):
    indices = jnp.asarray([3, 0, 39, 17])
    whole = matrix_of(40, kind, jnp.float32)
    assert_bit_equal(columns_of(40, indices, kind, jnp.float32), whole[:, indices])
    short = columns_of(40, indices, kind, jnp.bfloat16)
    assert short.dtype == jnp.bfloat16
    assert_bit_equal(short, whole[:, indices].astype(jnp.bfloat16))


# The choice of columns.


def matrix(m: int, n: int, r: int, side: str = "left"):
    return lro.Matrix("w", (m, n), (), (0,), (1,), side, r)


def choose(projector, gradient, side="left"):
    gradient = jnp.asarray(gradient)
    m, n = gradient.shape
    one = matrix(m, n, projector.rank, side)
    zero = jnp.int32(0)
    at = lro.At(jax.random.key(0), zero, zero, jnp.bool_(False), (), zero)

    @jax.jit
    def refresh(gradient):
        stored = projector.start(one)
        chosen = projector.refresh(one, one.view(gradient), stored, at)
        return chosen, projector.basis(one, chosen, at)

    return jax.tree.map(np.asarray, refresh(gradient))


@kinds
def test_by_squares_no_other_columns_capture_more(kind):
    m, r = 8, 3
    for seed in range(5):
        gradient = normal(seed, m, 11)
        chosen, basis = choose(lro.dct(r, kind=kind, norm=2), gradient)
        seen = exact(m, np.arange(m), kind).T @ gradient
        energy = np.sum(seen**2, axis=1)
        best = max(energy[list(s)].sum() for s in itertools.combinations(range(m), r))
        np.testing.assert_allclose(energy[chosen].sum(), best, rtol=1e-6)
        captured = np.sum(np.float64(basis.T @ gradient) ** 2)
        np.testing.assert_allclose(captured, best, rtol=1e-5)


@kinds
@norms
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_largest_scores_in_ascending_order(kind, norm, side):
    gradient = normal(3, 24, 16)
    view = gradient if side == "left" else gradient.T
    chosen, basis = choose(lro.dct(5, kind=kind, norm=norm), gradient, side)
    seen = np.abs(exact(len(view), np.arange(len(view)), kind).T @ view)
    scores = np.sum(seen**norm, axis=1)
    assert chosen.dtype == np.int32
    assert chosen.tolist() == sorted(np.argsort(scores)[-5:].tolist())
    want = exact(len(view), chosen, kind)
    np.testing.assert_allclose(basis, want, atol=ROUNDING)


def test_norms_and_kinds_choose_differently():
    chosen = {
        tuple(choose(lro.dct(5, kind=kind, norm=norm), normal(7, 24, 16))[0].tolist())
        for kind in KINDS
        for norm in (1, 2)
    }
    assert len(chosen) > 2


@norms
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15, 1e38])
def test_the_choice_does_not_depend_on_the_scale(norm, size):
    projector, gradient = lro.dct(4, norm=norm), np.clip(normal(1, 12, 20), -3, 3)
    scaled = (gradient * np.float32(size)).astype(np.float32)
    assert_bit_equal(choose(projector, gradient)[0], choose(projector, scaled)[0])


def test_a_smooth_gradient_takes_low_frequencies_and_a_stored_column_itself():
    smooth = np.outer(np.cos(np.arange(16) / 8), normal(0, 10))
    assert choose(lro.dct(3, kind="dct2"), smooth.astype(np.float32))[0].max() <= 4
    for kind in KINDS:
        column = exact(16, [11], kind) @ normal(0, 1, 10)
        assert 11 in choose(lro.dct(3, kind=kind), column.astype(np.float32))[0]


@pytest.mark.parametrize(("kind", "norm"), [("dct3", 1), ("dct2", 2)])
def test_projector_laws(kind, norm):
    assert_projector_laws(lro.dct(2, kind=kind, norm=norm), shapes=[(1, 6), (12, 8)])


def bracket(projector, inner=None, transport=None, **options):
    options = {"select": ".", "layer_axis": 0, **options}
    opening = lro.project(projector, transport=transport, **options)
    return lro.chain(opening, inner or optax.identity(), lro.backproject())


def run(tx, grads):
    params = jax.tree.map(jnp.ones_like, grads[0])
    state, step, out = tx.init(params), jax.jit(tx.update), []
    for gradient in grads:
        updates, state = step(gradient, state, params)
        out.append((updates, state))
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_stack_is_its_layers(dtype):
    grads = [{"w": jnp.asarray(normal(k, 3, 20, 12), dtype)} for k in range(3)]
    tx = lro.dct_adamw(1.0, 4, layer_axis=0, update_proj_gap=2)
    stack = run(tx, grads)
    for layer in range(3):
        alone = run(tx, [{"w": g["w"][layer]} for g in grads])
        for (updates, state), (own, own_state) in zip(stack, alone, strict=True):
            assert updates["w"].dtype == dtype
            assert_bit_equal(state.basis["w"][layer], own_state.basis["w"])
            np.testing.assert_allclose(
                np.float32(updates["w"][layer]),
                np.float32(own["w"]),
                atol=1e-5 if dtype == jnp.float32 else 0.02,  # a rounding of size 3
            )


def test_columns_are_chosen_at_every_gap_only():
    grads = [{"w": jnp.asarray(normal(k, 12, 20))} for k in range(7)]
    stored = [s.basis["w"].tolist() for _, s in run(bracket(lro.dct(4, 3)), grads)]
    assert stored[0] == stored[1] == stored[2] != stored[3]
    assert stored[3] == stored[4] == stored[5] != stored[6]
    every = [s.basis["w"].tolist() for _, s in run(bracket(lro.dct(4)), grads)]
    assert every[0] == stored[0] and every[0] != every[1]


def test_both_sides():
    tx = bracket(lro.dct(4), optax.trace(0.9), lro.gather_moments(), side="both")
    grads = [{"w": jnp.asarray(normal(k, 12, 20))} for k in range(2)]
    for (updates, state), gradient in zip(run(tx, grads)[:1], grads[:1], strict=True):
        left = exact(12, state.basis["w"].left, "dct3")
        right = exact(20, state.basis["w"].right, "dct3")
        want = left @ (left.T @ gradient["w"] @ right) @ right.T
        np.testing.assert_allclose(updates["w"], want, atol=1e-5)


# The gather.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gather_is_exact(dtype):
    """Rows go with their column, bit for bit; a row that left takes its NaN along."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        old, new = (np.sort(rng.choice(9, 5, replace=False)) for _ in range(2))
        low = normal(seed, 5, 7)
        gone = [i for i, column in enumerate(old) if column not in new]
        low[gone] = np.nan
        low = jnp.asarray(low, dtype)
        rotation = lro.dct(5).rotation(jnp.asarray(old), jnp.asarray(new))
        fields: Any = {"mu": low, "nu": jnp.abs(low), "trace": low + 2, "ema": low + 3}
        (moved,) = lro.gather_moments().move((fields,), rotation, jnp.int32(1))
        for field, before in fields.items():
            want = np.zeros(low.shape, low.dtype)
            if field == "nu":
                # New rows are filled; which rows are old is what is asked here.
                fill = np.asarray(moved[field])
                stay = np.isin(new, old)
                assert (
                    np.isfinite(fill[~stay].astype(np.float32)).all() or stay.sum() == 0
                )
                want[~stay] = fill[~stay]
            for slot, column in enumerate(new):
                if column in old:
                    want[slot] = np.asarray(before)[old.tolist().index(column)]
            assert_bit_equal(moved[field], want)


def test_a_new_column_has_the_second_moment_of_the_others():
    """On pure noise it is theirs, and the released code's zero on request."""
    nu = jnp.full((3, 5), 4.0)
    group = {"mu": jnp.ones((3, 5)), "nu": nu}
    for new in ([0, 1, 7], [6, 7, 8]):
        rotation = lro.dct(3).rotation(jnp.asarray([0, 1, 2]), jnp.asarray(new))
        (filled,) = lro.gather_moments().move((group,), rotation, jnp.int32(9))
        np.testing.assert_allclose(filled["nu"], nu, rtol=1e-6)
        stays = np.isin(new, [0, 1, 2])
        np.testing.assert_array_equal(filled["mu"][:, 0], stays)
        plain = lro.gather_moments(fill=False)
        (released,) = plain.move((group,), rotation, jnp.int32(9))
        np.testing.assert_array_equal(released["nu"][:, 0], 4.0 * stays)


def test_the_gather_on_both_sides():
    left, right = (
        lro.dct(2).rotation(jnp.asarray(old), jnp.asarray(new)).left
        for old, new in (([1, 4], [4, 5]), ([0, 3], [2, 3]))
    )
    low = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    rotation = lro.Rotation(left, right)
    (moved,) = lro.gather_moments().move(({"mu": low},), rotation, jnp.int32(1))
    assert moved["mu"].tolist() == [[0.0, 4.0], [0.0, 0.0]]
    side_by_side = jnp.concatenate([low, 10 * low], axis=1)
    (moved,) = lro.gather_moments().move(
        ({"mu": side_by_side},), rotation, jnp.int32(1)
    )
    assert moved["mu"].tolist() == [[0.0, 4.0, 0.0, 40.0], [0.0] * 4]


def test_moments_follow_their_columns_in_a_bracket():
    basis = exact(12, np.arange(12), "dct3").astype(np.float32)
    low = {column: normal(column, 20) for column in (1, 3, 5)}

    def gradient(*columns):
        seen = sum(np.outer(basis[:, c], low[c]) for c in columns)
        return {"w": jnp.asarray(seen)}

    tx = bracket(lro.dct(2), optax.trace(0.5), lro.gather_moments())
    (_, first), (_, second) = run(tx, [gradient(3, 5), gradient(1, 3)])
    assert first.basis["w"].tolist() == [3, 5]
    assert second.basis["w"].tolist() == [1, 3]
    trace = second.inner_state.trace["w"]
    np.testing.assert_allclose(trace[0], low[1], atol=1e-5)
    np.testing.assert_allclose(trace[1], 1.5 * low[3], atol=1e-5)


@pytest.mark.parametrize(
    ("projector", "message"),
    [(lro.svd(2), "share none"), (lro.gaussian(2), "keeps no basis")],
    ids=["svd", "gaussian"],
)
def test_bases_that_share_nothing_are_refused(projector, message):
    with pytest.raises(ValueError, match=message):
        bracket(projector, optax.scale_by_adam(), lro.gather_moments())


# DCT-AdamW.


def test_the_first_moment_is_that_of_a_rotation():
    """By the same 0-1 matrix, as a product."""
    grads = [{"w": jnp.asarray(normal(k, 12, 20))} for k in range(3)]
    gathered, rotated = (
        run(lro.dct_adamw(1.0, 4, transport=transport), grads)[-1][1]
        for transport in (None, lro.rotate_moments())
    )
    mu, other = (optax.tree_utils.tree_get(s, "mu") for s in (gathered, rotated))
    np.testing.assert_allclose(mu["w"], other["w"], atol=1e-6)


def test_error_feedback_keeps_what_was_left_out():
    """Without moments that forget: what was applied and what is left add up."""
    options = {"error_feedback": True, "base_optimizer": optax.trace(0.0)}
    tx = lro.dct_adamw(1.0, 3, select="w", **options)
    grads = [{"w": jnp.asarray(normal(k, 12, 20))} for k in range(5)]
    steps = run(tx, grads)
    applied = -sum(np.float64(updates["w"]) for updates, _ in steps)
    left = np.float64(steps[-1][1].recovery_state["w"])
    given = sum(np.float64(g["w"]) for g in grads)
    np.testing.assert_allclose(applied + left, given, atol=1e-5)
    assert np.linalg.norm(left) > 0.5 * np.linalg.norm(grads[0]["w"])


def test_the_conventions_differ_in_new_columns_alone():
    """The authors' second moments of new columns start at zero."""
    grads = [{"w": jnp.asarray(normal(k, 12, 20))} for k in range(2)]

    def last(**options):
        return run(lro.dct_adamw(1.0, 3, weight_decay=0.1, **options), grads)[-1]

    zeros = lro.gather_moments(fill=False)
    authors = last(conventions="authors")
    assert_bit_equal(last(transport=zeros), authors)
    with pytest.raises(AssertionError):
        assert_bit_equal(last(), authors)


def test_a_resumed_run_goes_on_as_before():
    grads = [{"w": jnp.asarray(normal(k, 12, 20))} for k in range(5)]
    make = functools.partial(lro.dct_adamw, 1.0, 3, error_feedback=True, select="w")
    whole = run(make(), grads)
    state = jax.tree.map(lambda x: jnp.asarray(np.array(x)), whole[1][1])
    step, params = jax.jit(make().update), jax.tree.map(jnp.ones_like, grads[0])
    for gradient, (expected, _) in zip(grads[2:], whole[2:], strict=True):
        updates, state = step(gradient, state, params)
        assert_bit_equal(updates, expected)


def test_a_sharded_run_is_that_of_one_device():
    tx = lro.dct_adamw(1.0, 4, eps=0.1, layer_axis=0, error_feedback=True)
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        sharded = Sharded(tx, PARAMS, named(mesh, LAYOUTS["both"]))
        updates, state = sharded.updates(gradients(PARAMS))
    expected, alone = updates_on_one_device(tx, PARAMS)
    bases: Any = [optax.tree_utils.tree_get(s, "basis") for s in (state, alone)]
    assert_bit_equal(*jax.tree.map(np.asarray, bases))
    assert_close(updates, expected)


@pytest.mark.parametrize("layers", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("feedback", [None, jnp.float32, jnp.bfloat16])
def test_state_bytes(feedback, shape, layers):
    """2 r l numbers and r indices, the error where it is kept, and one flag."""
    r, count, long = 4, 3 if layers else 1, max(shape)
    params = {"w": jnp.zeros((*layers, *shape))}
    options = {}
    if feedback is not None:
        options = {"error_feedback": True, "error_dtype": feedback}
    tx = lro.dct_adamw(1e-2, r, select="w", layer_axis=0, **options)
    table = lro.state_bytes(tx, params)
    one = {"basis": 4 * r, "mu": 4 * r * long, "nu": 4 * r * long}
    if feedback is not None:
        one["recovery"] = jnp.dtype(feedback).itemsize * shape[0] * shape[1]
    roles = {role: count * size for role, size in one.items()}
    assert table.by_role == {**roles, "other": 4 + 4 + 8 + count}
    state = tx.init(params)
    assert table.total == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"kind": "dct1"}, "kind"),
        ({"norm": 3}, "norm"),
        ({"conventions": "paper"}, "conventions"),
        ({"base_optimizer": optax.identity()}, "moves moments"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tx = lro.dct_adamw(
            **{"learning_rate": 1.0, "rank": 2, "select": "w", **options}
        )
        tx.init({"w": jnp.ones((12, 20))})


# The recorded runs.


def recorded():
    for path in cases.files():
        config = cases.read_config(path)
        if config and config.get("method") == "dct_adamw":
            yield pytest.param(path, id=path.stem)


@pytest.mark.parametrize("path", list(recorded()))
def test_our_rule_chooses_the_recorded_columns(path):
    case = cases.load(path)
    for name, found in choices(case).items():
        assert_bit_equal(found, np.sort(case.arrays[f"indices_{name}"], axis=1))
