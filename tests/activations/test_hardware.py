"""Profiles of devices, and timing the one at hand."""

import dataclasses

import pytest

from lowrank_optax import activations
from lowrank_optax.activations.planner.hardware import HARDWARE


def test_the_profiles():
    assert set(HARDWARE) == {
        *("v4", "v5e", "v5p", "v6e", "a100", "a100-40", "h100", "h200"),
        *("rtx3090", "rtx4090", "rtx5090", "cpu"),
    }
    for name, profile in HARDWARE.items():
        assert profile.name == name and profile.source
        assert profile.fuses == (name != "cpu")
        # A wrong power of ten would show: operations per byte of known devices.
        assert 5 < profile.flops / profile.bandwidth < 600
        assert profile.host_bandwidth <= profile.bandwidth
        assert 15 < profile.memory_bytes / 1e9 < 150


def test_a_profile_is_itself_and_a_name_is_looked_up():
    assert activations.hardware_profile("h100") is HARDWARE["h100"]
    own = dataclasses.replace(HARDWARE["h100"], name="mine")
    assert activations.hardware_profile(own) is own


def test_the_roofline_takes_what_is_longer():
    profile = activations.Hardware("x", 100.0, 10.0, 1, 1.0, efficiency=0.5)
    assert profile.seconds(100.0, 1.0) == 2.0
    assert profile.seconds(1.0, 100.0) == 10.0


def test_calibration_measures():
    small, large = (activations.calibrate(n, repeats=3) for n in (16, 512))
    # A product of 16 x 16 is all overhead: timed at all, it reaches fewer operations.
    assert large.flops > 5 * small.flops
    assert large.bandwidth > 0 and large.host_bandwidth > 0
    assert large.efficiency == 1.0 and not large.fuses
    assert "512" in large.source and large.memory_bytes > 2**28


def test_bad_input():
    with pytest.raises(ValueError, match=r"`hardware` must be one of 'v5e'.*got 'v9'"):
        activations.hardware_profile("v9")
    with pytest.raises(ValueError, match="`bandwidth` must be positive"):
        activations.Hardware("x", 1.0, 0.0, 1, 1.0)
    with pytest.raises(ValueError, match="`efficiency` must be above 0 and at most 1"):
        activations.Hardware("x", 1.0, 1.0, 1, 1.0, efficiency=2.0)
    with pytest.raises(TypeError, match="`size` must be a positive int"):
        activations.calibrate(2.5)
