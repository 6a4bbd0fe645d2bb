"""A little of `make storm`, and all of `make faults`."""

import pytest

from tests import faults, storm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [0, 3], ids=["one process", "two processes"])
def test_a_little_storm(tmp_path, number):
    result = storm.series(tmp_path, number, 2, seed=0)
    assert result["kills"] == 2
    assert result["wrong"] == []


@pytest.mark.parametrize("name", faults.FAULTS)
def test_faults(tmp_path, name):
    try:
        faults.FAULTS[name](tmp_path)
    except faults.Skipped as why:
        pytest.skip(str(why))
