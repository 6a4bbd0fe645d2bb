"""What GWT refuses, and what its messages say."""

import jax
import jax.numpy as jnp
import jaxtyping
import optax
import pytest

import lowrank_optax as lro


@pytest.fixture(autouse=True)
def no_type_checks():
    """Users have no run-time type checks: the package's own messages must come."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PARAMS = {"layer": {"kernel": jnp.ones((12, 8))}}


def bracket(inner, projector=None):
    projector = lro.wavelet(2) if projector is None else projector
    return lro.chain(
        lro.project(projector, select="."),
        inner,
        lro.wavelet_details(),
        lro.backproject(),
    )


@pytest.mark.parametrize(
    "inner",
    [optax.identity(), optax.trace(0.9), optax.scale_by_lion()],
    ids=["none", "trace", "lion"],
)
def test_no_second_moment_to_divide_by(inner):
    tx = bracket(inner)
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"'layer/kernel' has none .*`nu` or `col`.*\"matrix\""
    ):
        tx.update(PARAMS, state)


def test_another_projector():
    tx = bracket(optax.scale_by_adam(), lro.svd(2))
    with pytest.raises(ValueError, match=r"completes lro\.wavelet; .*'layer/kernel'"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_an_accumulation_inside():
    inner = optax.MultiSteps(optax.scale_by_adam(), 2)
    with pytest.raises(ValueError, match=r"wavelet_details .*MultiSteps around the"):
        bracket(inner).init(PARAMS)


@pytest.mark.parametrize("side", ["both", "left", "right", "long", "auto"])
@pytest.mark.parametrize("axis", [-2, "auto"])
def test_a_side_besides_the_axis(side, axis):
    tx = lro.gwt(1e-3, axis=axis, side=side)
    with pytest.raises(ValueError, match=rf"lro\.wavelet .* axis.*side='{side}'"):
        tx.init(PARAMS)


@pytest.mark.parametrize("make", [lro.wavelet, lambda *a: lro.gwt(1e-3, *a)])
@pytest.mark.parametrize("level", [True, 1.5, "2", None])
def test_level_is_no_int(make, level):
    with pytest.raises(TypeError, match="`level` must be an int, got"):
        make(level)


def test_level_below_zero_or_traced():
    with pytest.raises(ValueError, match="`level` must be at least 0, got -1"):
        lro.gwt(1e-3, level=-1)
    with pytest.raises(TypeError, match=r"`level` must .*static_args=lro\.static_args"):
        jax.jit(lambda level: lro.gwt(1e-3, level) and level)(2)


@pytest.mark.parametrize("wavelet", ["sym4", "db0", "db11", "Haar", None])
def test_unknown_wavelet(wavelet):
    with pytest.raises(ValueError, match=r"`wavelet` must be one of 'haar', .*'db10'"):
        lro.gwt(1e-3, wavelet=wavelet)


@pytest.mark.parametrize("axis", [2, -3, "rows", None])
def test_unknown_axis(axis):
    with pytest.raises(ValueError, match=rf"`axis` must be one of .*got {axis!r}"):
        lro.gwt(1e-3, axis=axis)


@pytest.mark.parametrize("normalize", ["column", None, "True"])
def test_unknown_normalization(normalize):
    with pytest.raises(ValueError, match="`normalize` must be one of True, False, 'm"):
        lro.gwt(1e-3, normalize=normalize)
