"""SinkGD's and RACS' cases: the papers' rules, recorded in float64; no code exists."""

import jax
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within

# torch's weights are (out, in), which the rules are not symmetric in.
_TORCH = {
    "select": ".",
    "weight_dimension_numbers": lro.MatrixDimensionNumbers(1, 0),
}
# Of travels of up to 0.03; 2.1e-8 was measured.
_CLOSE = within(1e-6)


def sinkgd(case: Case) -> Replay:
    """Rows of torch's weights first, columns last."""
    config = case.config
    if not config["order"].startswith("rows to norm sqrt(columns), then columns"):
        raise ValueError(f"Another order: {config['order']}")
    _check_exact(case)
    tx = lro.sinkgd(
        config["learning_rate"],
        iterations=config["iterations"],
        scale=config["scale"],
        weight_decay=config["weight_decay"] or None,
        **_TORCH,
    )
    return Replay(tx, _CLOSE, lambda state: {}, _CLOSE)


def racs(case: Case) -> Replay:
    """Means that start at zero, with or without correction of their bias."""
    config = case.config
    start = config["s_init"], config["q_init"], config["q_start"], config["fixed_point"]
    if start != (0.0, 0.0, 1.0, True):
        raise ValueError(f"Another start: {start}")
    _check_exact(case)
    tx = lro.racs(
        config["learning_rate"],
        decay=config["beta"],
        growth_limit=config["limiter"],
        iterations=config["iterations"],
        debias=config["bias_correction"],
        scale=config["scale"],
        weight_decay=config["weight_decay"] or None,
        **_TORCH,
    )
    return Replay(tx, _CLOSE, lambda state: {}, _CLOSE)


def racs_finals(case: Case, state: jax.Array) -> dict[str, jax.Array]:
    """The recorded last factors and norms by name, out of a state."""
    fields = {"s": "col", "q": "row", "phi": "norm"}
    return {
        f"{recorded}_final_{name}": optax.tree_utils.tree_get(state, field)[name]
        for recorded, field in fields.items()
        for name in case.names
    }


def _check_exact(case: Case) -> None:
    if not case.config["precision"].startswith("float64"):
        raise ValueError(f"Recorded in {case.config['precision']}.")
