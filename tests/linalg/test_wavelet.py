"""The wavelet transform: filters, isometry, reconstruction, and what it costs."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lowrank_optax.linalg.wavelet import (
    WAVELETS,
    Bands,
    band_sizes,
    dwt,
    filter_taps,
    idwt,
    lift,
    repeat,
)
from tests import wavelets

# A level adds L rounded products per coefficient, forth and back; with four levels of
# numbers below 2 that is a few times float32's 6e-8 and stays below 1e-6.
ATOL = 1e-6
SHORT = ("haar", "db2")
LONG = WAVELETS[3:]


def uniform(seed, *shape):
    draw = np.random.default_rng(seed).uniform(-1.0, 1.0, shape)
    return jnp.asarray(draw, jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def there_and_back(x, level, wavelet, axis):
    """Returns the bands, what they give back, and what the approximation alone gives.

    Then ``idwt`` with details of zero, for comparison with the last.
    """
    bands = dwt(x, level, wavelet, axis)
    n = x.shape[axis]
    without = Bands(bands.approximation, tuple(map(jnp.zeros_like, bands.details)))
    return (
        bands,
        idwt(bands, n, wavelet, axis),
        lift(bands.approximation, n, level, wavelet, axis),
        idwt(without, n, wavelet, axis),
    )


def energy(*arrays):
    return sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in arrays)


def assert_laws(x, level, wavelet, axis=-1, size=1.0):
    """Properties 1 and 2, the bands' values and shapes, and ``lift``."""
    bands, back, lifted, without = there_and_back(x, level, wavelet, axis)
    n, atol = x.shape[axis], size * ATOL
    np.testing.assert_allclose(back, x, rtol=0, atol=atol)
    np.testing.assert_allclose(lifted, without, rtol=0, atol=atol)
    # Relative to the whole: every coefficient is within 2e-7 of its vector.
    np.testing.assert_allclose(
        energy(bands.approximation / size, *(d / size for d in bands.details)),
        energy(x / size),
        rtol=2e-6,
    )
    low, high = wavelets.all_levels(n, level, wavelet)
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    for got, matrix in zip(bands.details[::-1], high, strict=True):
        want = np.moveaxis(moved @ matrix.T, -1, axis)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    want = np.moveaxis(moved @ low.T, -1, axis)
    np.testing.assert_allclose(bands.approximation, want, rtol=0, atol=2 * atol)
    sizes = band_sizes(n, level, wavelet)
    assert [d.shape[axis] for d in bands.details] == list(sizes[:0:-1])
    assert bands.approximation.shape[axis] == sizes[-1]


# --- Filters -------------------------------------------------------------------------


def test_filters_in_closed_form():
    for wavelet in ("haar", "db1", "db2"):
        np.testing.assert_allclose(
            filter_taps(wavelet), wavelets.taps(wavelet), rtol=1e-15
        )


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal_and_smooth(wavelet):
    """Rounding in float64 of at most 20 taps, moments relative to their terms."""
    low = np.array(filter_taps(wavelet))
    order = 1 if wavelet == "haar" else int(wavelet[2:])
    assert len(low) == 2 * order
    np.testing.assert_allclose(low.sum(), np.sqrt(2.0), rtol=1e-14)
    for shift in range(order):
        product = np.sum(low[: len(low) - 2 * shift] * low[2 * shift :])
        np.testing.assert_allclose(product, shift == 0, atol=1e-13)
    place = np.arange(len(low)) - (len(low) - 1) / 2
    for power in range(order):
        terms = (-1.0) ** np.arange(len(low)) * place**power * low
        assert abs(terms.sum()) < 1e-13 * abs(terms).sum()


@pytest.mark.parametrize("wavelet", WAVELETS[2:])
def test_filters_have_their_energy_in_front(wavelet):
    """Of all filters with these two properties, the one with the roots inside."""
    low = np.array(filter_taps(wavelet))
    order = len(low) // 2
    smooth = np.poly([-1.0] * order)
    rest, remainder = np.polydiv(low, smooth)
    assert np.abs(remainder).max() < 1e-9
    assert np.abs(np.roots(rest)).max() < 1.0


# --- The transform -------------------------------------------------------------------


@hypothesis.given(
    n=st.integers(1, 65), level=st.integers(0, 4), wavelet=st.sampled_from(SHORT)
)
@hypothesis.settings(max_examples=30)
def test_every_size_and_level(n, level, wavelet):
    assert_laws(uniform(n, 3, n), level, wavelet)


@pytest.mark.parametrize(
    ("wavelet", "n", "level"),
    [(w, n, 1) for w, n in zip(LONG, (1, 8, 3, 12, 15, 7, 36, 5), strict=True)]
    + [("db3", 33, 2), ("db4", 7, 2)],
)
def test_longer_filters(wavelet, n, level):
    """Arrays shorter and longer than the filter, odd and even."""
    assert_laws(uniform(n, 2, n), level, wavelet)


@pytest.mark.parametrize("wavelet", SHORT)
@pytest.mark.parametrize("axis", [0, 1, -2, -1])
def test_any_axis_of_a_stack(wavelet, axis):
    assert_laws(uniform(0, 5, 3, 6, 7), 2, wavelet, axis)


def test_a_stack_is_as_many_matrices():
    x = uniform(0, 2, 3, 11, 4)
    for wavelet in SHORT:

        def transform(x, wavelet=wavelet):
            return dwt(x, 2, wavelet, -2)

        together, alone = jax.jit(transform)(x), jax.jit(transform)(x[1, 2])
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a[1, 2], b), together, alone
        )


@pytest.mark.parametrize("wavelet", SHORT)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15, 1e37])
def test_any_magnitude(wavelet, size):
    assert_laws(uniform(0, 2, 21) * jnp.float32(size), 3, wavelet, size=size)


@pytest.mark.parametrize("wavelet", [*SHORT, "db6"])
def test_zero_stays_zero(wavelet):
    for x in jax.tree.leaves(there_and_back(jnp.zeros((2, 9)), 2, wavelet, -1)):
        np.testing.assert_array_equal(x, 0.0)


@pytest.mark.parametrize("wavelet", [*SHORT, "db5"])
@pytest.mark.parametrize(("n", "level"), [(24, 2), (25, 3)])
def test_the_inverse_is_the_adjoint(wavelet, n, level):
    """Also on bands that are no transform of anything, where the two differ.

    Sums of some 50 products in float32.
    """
    x = uniform(0, n)
    sizes = band_sizes(n, level, wavelet)
    approximation = uniform(1, sizes[-1])
    details = tuple(uniform(2 + i, size) for i, size in enumerate(sizes[:0:-1]))
    other = Bands(approximation, details)

    @jax.jit
    def products(x, other):
        forth = jax.tree.map(jnp.vdot, dwt(x, level, wavelet), other)
        return sum(jax.tree.leaves(forth)), jnp.vdot(x, idwt(other, n, wavelet))

    np.testing.assert_allclose(*products(x, other), atol=5e-6)


def test_level_zero_is_the_array_itself():
    x = uniform(0, 3, 5)
    bands = dwt(x, 0, "db2", 0)
    assert bands.approximation is x and bands.details == ()
    assert idwt(bands, 3, "db2", 0) is x


def test_haar_in_closed_form():
    x, half = uniform(0, 2, 10), np.float32(np.sqrt(0.5))
    (a2, (d2, d1)) = dwt(x, 2, "haar")
    first, second = x[:, ::2], x[:, 1::2]
    np.testing.assert_allclose(d1, half * (first - second), atol=ATOL)
    sums = jnp.pad(half * (first + second), ((0, 0), (0, 1)))  # 5, and a zero
    np.testing.assert_allclose(d2, half * (sums[:, ::2] - sums[:, 1::2]), atol=ATOL)
    blocks = jnp.pad(x, ((0, 0), (0, 2))).reshape(2, 3, 4)
    np.testing.assert_allclose(a2, blocks.sum(-1) / 2.0, atol=ATOL)


def test_constant_blocks_have_no_details():
    """Exactly: the difference of two equal numbers."""
    x = jnp.repeat(uniform(0, 4, 6), 8, axis=1)
    bands = dwt(x, 3, "haar")
    for detail in bands.details:
        np.testing.assert_array_equal(detail, 0.0)
    np.testing.assert_allclose(bands.approximation, x[:, ::8] * 8**0.5, atol=1e-5)


def test_db2_sees_no_detail_in_a_line():
    """Two vanishing moments, away from the boundary of zeros."""
    _, (detail,) = dwt(jnp.arange(30, dtype=jnp.float32) / 30.0, 1, "db2")
    np.testing.assert_allclose(detail[1:-1], 0.0, atol=ATOL)
    assert abs(float(detail[-1])) > 0.1


def test_band_sizes():
    for n in range(1, 66):
        halved = [-(-n // 2**level) for level in range(5)]  # ceil
        assert band_sizes(n, 4, "haar") == tuple(halved)
        sizes = [n]
        for _ in range(4):
            sizes.append((sizes[-1] + 3) // 2)
        assert band_sizes(n, 4, "db2") == tuple(sizes)
    assert band_sizes(33, 0, "db10") == (33,)


def test_repeat_cuts_what_is_too_long():
    x = jnp.arange(6.0).reshape(2, 3)
    want = np.repeat(x, 4, axis=1)[:, :10]
    np.testing.assert_array_equal(repeat(x, 10, 2), want)
    np.testing.assert_array_equal(repeat(x.T, 10, 2, 0), want.T)
    np.testing.assert_array_equal(repeat(x, 3, 0), x)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_stay(wavelet, dtype):
    x = jax.ShapeDtypeStruct((3, 13), dtype)
    shapes = jax.eval_shape(lambda x: there_and_back(x, 2, wavelet, -1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}


# --- What it is made of --------------------------------------------------------------


def primitives(function, *arguments):
    """Names all primitives of a traced function, those of its calls included."""
    names = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            names.add(equation.primitive.name)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return names


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_no_convolution_no_product_no_gather(wavelet):
    def both(x):
        return there_and_back(x, 3, wavelet, -2)

    names = primitives(both, jnp.zeros((2, 45, 3)))
    assert {"add", "mul"} <= names
    forbidden = {"conv_general_dilated", "dot_general", "gather", "scatter", "sort"}
    assert not names & forbidden
    if wavelet == "haar":  # nor are two arrays joined: that would be one more pass
        assert "concatenate" not in names


def test_the_search_sees_a_convolution_inside_a_call():
    @jax.jit
    def smooth(x):
        return jnp.convolve(x, jnp.ones(2))

    assert "conv_general_dilated" in primitives(smooth, jnp.zeros(8))
