"""Optax's own common suite, as it is installed, on every method."""

import importlib
import inspect

import optax.contrib
import pytest

import lowrank_optax as lro

# Two numbers by three are not worth a projection, and nobody said what the axes are.
pytestmark = pytest.mark.filterwarnings(
    "ignore::lowrank_optax.bracket.selection.NotProjectedWarning"
)
suite = pytest.importorskip(
    "optax.contrib._common_test",
    reason="this Optax is packaged without its tests",
)

SETUPS = ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")
# (test of the suite, its arguments but for the optimizer). The first of a kind stands
# for all where the others would only repeat it in another dtype or on another tree.
QUICK = {
    "inject": ("test_optimizers_can_be_wrapped_in_inject_hyperparams", {}),
    "bfloat16": ("test_preserve_dtype", {"dtype": "bfloat16"}),
}
SLOW = {
    "extra": ("test_optimizers_accept_extra_args", {"wrap": False}),
    "extra wrapped": ("test_optimizers_accept_extra_args", {"wrap": True}),
    "float32": ("test_preserve_dtype", {"dtype": "float32"}),
    "schedule": (
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
        {},
    ),
    **{
        f"accumulate {dtype}": ("test_gradient_accumulation", {"dtype": dtype})
        for dtype in ("bfloat16", "float32")
    },
    **{
        f"stable {dtype}": ("test_state_shape_dtype_shard_stability", {"dtype": dtype})
        for dtype in ("float16", "bfloat16", "float32", "float64")
    },
    **{
        f"converges {name}": ("test_optimizers", {"target": name, "dtype": "float32"})
        for name in SETUPS
    },
}


def body(name):
    """The suite's function itself, without the optimizers that it lists."""
    cases = [n for n in dir(suite.ContribTest) if n.startswith(name)]
    return inspect.unwrap(getattr(suite.ContribTest, cases[0]))


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(
            pytest.param(*case, id=name, marks=pytest.mark.slow)
            for name, case in SLOW.items()
        ),
    ],
)
@pytest.mark.parametrize("name", lro.METHODS)
def test_of_optax(name, test, arguments, monkeypatch):
    factory = lro.METHODS[name].factory
    # A name of our own: Optax has a `galore`, too.
    monkeypatch.setattr(optax.contrib, f"lro_{name}", factory, raising=False)
    options = {"learning_rate": 1e-2}
    if "rank" in inspect.signature(factory).parameters:
        options["rank"] = 1
    arguments = dict(arguments)
    if "target" in arguments:
        arguments["target"] = getattr(suite, f"_setup_{arguments['target']}")
    if test == "test_state_shape_dtype_shard_stability":
        arguments["dtype"] = getattr(
            importlib.import_module("jax.numpy"), arguments["dtype"]
        )
    body(test)(
        suite.ContribTest(),
        opt_name=f"lro_{name}",
        opt_kwargs=options,
        wrapper_name=None,
        wrapper_kwargs=None,
        **arguments,
    )
