"""``static_args``: of the methods, of Optax' factories, and of anyone's own."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Optional, Union

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float

import lowrank_optax as lro

if TYPE_CHECKING:
    from elsewhere import Scalar, Widget  # pyright: ignore

Rate = typing.NewType("Rate", float)


def plain(lr, rank, weight_decay=0, momentum=0, warmup_steps=100, mask=None):
    return lr, rank, weight_decay, momentum, warmup_steps, mask


def annotated(
    learning_rate: float,
    scale: Optional[float],  # noqa: UP045 as users write it
    clip: Union[float, jax.Array, None],  # noqa: UP007
    decay: jax.typing.ArrayLike,
    b1: Float[Array, ""],
    b2: Annotated[float, "decay"],
    warm: optax.Schedule,
    rate: Rate,
    eps: np.ndarray | float,
    n_layers: int,
    name: str,
    fast: bool,
    size: int | None,
    path: Callable[[str], int],
    mask: Callable[[Any], Any] | None,
    filter_fn: Callable[[Array], Array],
    dtype: Any = jnp.float32,
): ...


def hidden(learning_rate: "Scalar", rank: "int", widget: "Widget", eps: "float" = 1.0):
    return learning_rate, rank, widget, eps


def odd(learning_rate: Any, rank: float = 0.5, update_proj_gap=None, select=None): ...


def integers(learning_rate: int = 1, steps: int = 2, level=2, every_k_schedule=4): ...


class Factory:
    def __init__(self, lr: Any = 1e-3, rank: int = 4):
        self.lr, self.rank = lr, rank


OWN = {
    plain: "rank warmup_steps mask",
    annotated: "n_layers name fast size path mask filter_fn dtype",
    hidden: "rank widget",
    odd: "rank update_proj_gap select",
    integers: "steps level every_k_schedule",
    Factory: "rank",
    functools.partial(plain, rank=4): "rank warmup_steps mask",
    functools.partial(hidden, 1.0): "rank widget",
}


@pytest.mark.parametrize(("fn", "static"), OWN.items(), ids=lambda x: str(x)[:20])
def test_of_a_factory_of_your_own(fn, static):
    assert lro.static_args(fn) == tuple(static.split())


@pytest.mark.parametrize("name", lro.METHODS)
def test_no_number_of_a_method_is_static_and_no_size_is_injected(name):
    method = lro.METHODS[name]
    for fn in filter(None, (method.factory, method.direction)):
        parameters = inspect.signature(fn).parameters
        static = set(lro.static_args(fn))
        numbers = {n for n, p in parameters.items() if isinstance(p.default, float)}
        numbers -= {"rank"}  # a fraction of a size, which fixes shapes
        assert not static & (numbers | {"learning_rate"})
        assert static >= {
            n
            for n, p in parameters.items()
            if isinstance(p.default, int | str) or n in ("rank", "dtype", "projector")
        }


FACTORIES = [
    *(getattr(optax, n) for n in "adam adamw sgd lion lamb rmsprop novograd".split()),
    *(getattr(optax, n) for n in "adafactor adabelief yogi adan amsgrad sm3".split()),
    *(getattr(optax.contrib, n) for n in "muon ademamix adopt prodigy".split()),
    optax.contrib.schedule_free_adamw,
]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_of_factories_of_optax(factory):
    static = lro.static_args(factory)
    assert "learning_rate" not in static
    make = optax.inject_hyperparams(factory, static_args=static)
    params = {"w": jnp.ones((4, 3))}
    tx = make(learning_rate=optax.linear_schedule(1.0, 0.5, 2))
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)
    assert "learning_rate" in state.hyperparams


def test_a_schedule_of_an_own_factory_is_injected():
    def own(lr, rank=2, weight_decay=0):
        return lro.galore(lr, rank=rank, weight_decay=weight_decay)

    make = optax.inject_hyperparams(own, static_args=lro.static_args(own))
    tx, params = make(optax.linear_schedule(1.0, 0.0, 2)), {"w": jnp.ones((8, 8))}
    state = tx.init(params)
    for expected in (1.0, 0.5, 0.0):
        _, state = jax.jit(tx.update)(params, state, params)
        assert float(state.hyperparams["lr"]) == expected
    assert set(state.hyperparams) == {"lr", "weight_decay"}
