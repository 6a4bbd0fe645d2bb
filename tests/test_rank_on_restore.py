"""A state that was made at another rank is refused in words, whatever its kind."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import pytest

import lowrank_optax as lro
from tests.rows import ROWS, subject
from tests.test_newcomers import PARAMS


def at_another_rank(make: Any):
    """The same with another rank or level, and how the two are asked for."""
    options, own = make.keywords, inspect.signature(make.func).parameters
    if "projector" in options:
        projector = dataclasses.replace(options["projector"], rank=1)
        return functools.partial(make, projector=projector), "rank", 2, 1
    if "level" in own:
        level = options.get("level", 2)
        return functools.partial(make, level=3 - level), "level", level, 3 - level
    rank = options["rank"]
    return functools.partial(make, rank=3 - rank), "rank", rank, 3 - rank


HAVING = {"rank", "level"}
SIZED = [
    name
    for name, row in ROWS.items()
    if HAVING & set(inspect.signature(row.make.func).parameters)
]


@pytest.mark.parametrize("name", SIZED)
def test_the_error_says_both_ranks(name):
    params = subject(name).params
    made = jax.eval_shape(ROWS[name].make().init, params)
    other, option, before, now = at_another_rank(ROWS[name].make)
    update = other().update
    message = (
        rf"made with {option} {before} for leaf '.*kernel'.*has {option} {now}\. "
        rf"Use {option}={before} to go on"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(update, params, made, params)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(lro.galore_8bit, min_size=0),
        # At one of the two ranks alone the moments are large enough to be encoded.
        functools.partial(lro.galore_8bit, min_size=8 * 32 + 1),
        functools.partial(lro.galore, side="both"),
        functools.partial(lro.coap, side="both"),
        lro.natural_galore,
    ],
)
@pytest.mark.parametrize("ranks", [(8, 16), (16, 8)])
def test_encoded_and_two_sided_states(make, ranks):
    before, now = ranks
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}}
    state = jax.eval_shape(make(1e-3, rank=before, select=".").init, params)
    update = make(1e-3, rank=now, select=".").update
    with pytest.raises(ValueError, match=rf"rank {before} for .* has rank {now}\."):
        jax.eval_shape(update, params, state, params)


def test_wrapped_projectors():
    for wrap in (lro.lazy, lro.quantize_basis):
        one, two = (lro.galore(1.0, projector=wrap(lro.svd(r))) for r in (2, 3))
        state = jax.eval_shape(one.init, PARAMS)
        with pytest.raises(ValueError, match=r"rank 2 .*kernel.*has rank 3\."):
            jax.eval_shape(two.update, PARAMS, state, PARAMS)


def test_leaves_that_are_projected_in_one_of_the_two():
    params = {**PARAMS, "other": {"weight": PARAMS["layer"]["kernel"]}}
    one, two = lro.galore(1.0, 2, select="kernel"), lro.galore(1.0, 2, select="other")
    states = [jax.eval_shape(tx.init, params) for tx in (one, two)]
    words = [(two, states[0], "projected, and"), (one, states[1], "at full size")]
    for tx, state, said in words:
        with pytest.raises(ValueError, match=f"made with leaf 'layer/kernel' {said}"):
            jax.eval_shape(tx.update, params, state, params)
