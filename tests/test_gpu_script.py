"""The prepared script for a GPU: its rows can be made, and its table is whole."""

import jax
import pytest

import lowrank_optax as lro
from benchmarks import gpu
from examples.llama.model import abstract_model
from examples.llama.presets import PRESETS


@pytest.mark.parametrize("name", gpu.ROWS)
def test_rows_keep_a_state(name):
    params = abstract_model(PRESETS["tiny"].model)[1]
    if name.startswith("optax.contrib"):
        params = {"a": jax.ShapeDtypeStruct((128, 352), "bfloat16")}
    state = jax.eval_shape(gpu.ROWS[name](32).init, params)
    assert lro.bytes_per_device(state) > 0


def test_table():
    row = {"bare_ms": 2.0, "with_apply_ms": 3.0, "state_bytes": 2**21}
    rows = {
        "1b/512/optax.adamw": row | {"peak_bytes": None},
        "1b/512/even_muon": row | {"bare_ms": 3.0, "peak_bytes": 2**30},
    }
    *_, adamw, even = gpu.table(rows).splitlines()
    assert adamw == "| 1b, 512, optax.adamw | 2.00 | 1.00 | 3.00 | 1.00 | 2 | - |"
    assert even == "| 1b, 512, even_muon | 3.00 | 1.50 | 3.00 | 1.00 | 2 | 1,024 |"
