"""Losses of 20 steps, on 1, 2, 4 and 8 devices, are the same wherever arrays lie.

The whole grid: at most 5e-7 for methods with float32 states, on jax 0.10.2.
"""

import jax
import numpy as np
import pytest

from tests.examples.grid import METHODS, run_on, run_on_one

LAYOUTS = {
    "fsdp=2": 2,
    "tensor=2": 2,
    "fsdp=4": 4,
    "tensor=4": 4,
    "fsdp=2,tensor=2": 4,
    "fsdp=8": 8,
    "tensor=8": 8,
    "fsdp=4,tensor=2": 8,
    "data=2,fsdp=2,tensor=2": 8,
}
TOLERANCE = 1e-5
# A sum in another order differs in its last bit; where that carries an entry over the
# middle between two codes, the stored moment differs by a whole step of its code.
# No layout of sums can be that of all meshes. One device that is given the rows of its
# batches in another order is as far off (the last test): 5e-5 there, 1e-4 on meshes.
TOLERANCE_8BIT = 2e-4
BEFORE_CODES_DIFFER = 4  # steps, which are held to 1e-5 as well


def check(found, method):
    expected = run_on_one(method)
    apart = np.abs(found - expected) / expected
    print(f"{method}: {apart.max():.1e}")
    if method == "galore_8bit":
        assert apart.max() < TOLERANCE_8BIT
        apart = apart[:BEFORE_CODES_DIFFER]
    assert apart.max() < TOLERANCE


# Of the default run; AdamW and GaLore are in test_mesh.py.
COVER = [
    ("subtrack", "auto", "tensor=2"),
    ("gwt", "auto", "fsdp=4,tensor=2"),
    ("galore_8bit", "explicit", "fsdp=8"),
]


@pytest.mark.whole
@pytest.mark.parametrize(("method", "kind", "sizes"), COVER)
def test_losses_agree(method, kind, sizes):
    check(run_on(kind, method, sizes, LAYOUTS[sizes]), method)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_losses_agree_everywhere(method, sizes, kind):
    check(run_on(kind, method, sizes, LAYOUTS[sizes]), method)
    jax.clear_caches()


@pytest.mark.slow
def test_eight_bits_on_one_device_depend_on_the_order_of_rows():
    """What the tolerance of eight bits stands on; float32 states do not show it."""

    def apart(method):
        expected, found = run_on_one(method), run_on_one(method, backwards=True)
        return np.max(np.abs(found - expected) / expected)

    assert apart("galore") < 1e-6
    assert 1e-5 < apart("galore_8bit") < TOLERANCE_8BIT
