"""Every client trains, projects what it should, and a restart leaves no trace."""

import importlib
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from examples.clients import common

pytestmark = [
    pytest.mark.clients,
    # What other software does that JAX or NumPy advise against is not ours to mend.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# How each client is run; the first word says whether anything is cut.
CASES = {
    "nnx_optimizer": {
        "cut, Auto": {"kind": AxisType.Auto},
        "cut, Explicit": {"kind": AxisType.Explicit},
    },
    "linen_train_state": {
        "msgpack": {"form": "msgpack"},
        "orbax": {"form": "orbax"},
    },
    "equinox_module": {"one device": {}},
    "keras_jax": {"one device": {}, "cut": {"sharded": True}},
    "multi_steps": {"one device": {}},
    "orbax_loop": {
        "cut, Auto": {"kind": AxisType.Auto},
        "cut, Explicit": {"kind": AxisType.Explicit},
    },
    "tunix_peft": {"one device": {}, "cut": {"sharded": True}},
    "maxtext_pretrain": {"cut": {}},
}


def client(name):
    if name == "maxtext_pretrain" and sys.version_info < (3, 12):
        pytest.skip("MaxText needs Python 3.12, and there is none on this machine")
    try:
        return importlib.import_module(f"examples.clients.{name}")
    except ModuleNotFoundError as error:
        pytest.fail(
            f"{name}: no module {error.name!r} here; `make test-clients` installs the "
            "group `clients` of pyproject.toml"
        )


@pytest.mark.parametrize("method", common.METHODS)
@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name, ways in CASES.items() for how in ways]
)
def test_client(name, how, method):
    module = client(name)
    run, changed = common.restarted(module.train, method, **CASES[name][how])
    assert sorted(run.report.projected) == sorted(module.PROJECTED)
    assert run.losses[-1] < run.losses[0] - 0.1
    assert not changed
    sizes = {x.dtype.itemsize for x in jax.tree.leaves(run.state) if x.dtype != bool}
    assert (1 in sizes) == (method == "galore_8bit")
    if how.startswith("cut"):
        cut = set(getattr(module, "CUT", module.PROJECTED))
        assert cut <= set(cut_moments(run.state, cut))


def cut_moments(state, leaves):
    """Those of the leaves of whose first moment each device has a part."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        words = "/".join(re.findall(r"\w+", jax.tree_util.keystr(path)))
        if "/mu/" in words and not x.sharding.is_fully_replicated:
            yield from (leaf for leaf in leaves if f"/{leaf}" in words)


def test_what_is_keras_own_acts_around_the_method():
    """Its schedules, weight decay and accumulation, as around its own AdamW."""
    keras, adapter = client("keras_jax").keras, client("keras_jax").Optax
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.0])
    options = {"weight_decay": 0.1, "gradient_accumulation_steps": 2}

    def kernels(optimizer):
        # Without a gradient the decay is all there is.
        kernel = keras.Variable(np.ones((16, 32), np.float32), name="kernel")
        optimizer.build([kernel])
        for _ in range(5):
            optimizer.apply([keras.ops.zeros((16, 32))])
            yield np.array(kernel.value)

    ours = kernels(adapter("gwt", {"level": 2}, rate, **options))
    theirs = kernels(keras.optimizers.AdamW(rate, **options))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert one.max() < 1
