"""Devices by name, meshes without devices, and bytes on one of them."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro


@pytest.mark.parametrize(
    ("text", "chip", "devices"),
    [
        ("v5e:16x16", "v5e", 256),
        ("v4:4x4x8", "v4", 128),  # a chip is one device
        ("v5p:2x2x2", "v5p", 8),
        ("v6e:4x8", "v6e", 32),
        ("h100:8", "h100", 8),
    ],
)
def test_topologies(text, chip, devices):
    found = lro.parse_topology(text)
    assert (found.name, found.chip, found.devices) == (text, chip, devices)
    assert found.is_tpu == text.startswith("v")


@pytest.mark.parametrize(
    "text", ["v9:2x2", "v5e", "v5e:3x5", "h100:2x2", "v5e:axb", "v4:8", "v5p:2x2x0"]
)
def test_unknown_topologies_name_the_known(text):
    with pytest.raises(ValueError, match=r"v5e or v6e .*4x8.* v4 or v5p .*h100:8"):
        lro.parse_topology(text)


def larger(text):
    return list(lro.parse_topology(text).larger())


def test_larger_slices():
    assert larger("v5e:8x8") == ["v5e:8x16", "v5e:16x16"]
    assert larger("v4:2x2x4")[:3] == ["v4:2x4x4", "v4:4x4x4", "v4:4x4x8"]
    assert larger("h100:8")[0] == "h100:16"


def test_devices_without_a_compiler(monkeypatch):
    with pytest.raises(ValueError, match=r"h100:8 is no slice of TPUs \(v4, v5e"):
        lro.topology_devices("h100:8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install .*\[tpu\]"):
        lro.topology_devices("v5e:2x2")


def test_the_compiler_is_asked_for_the_slice(monkeypatch):
    asked = []

    def describe(**options):
        asked.append(options)
        if options["topology_name"] == "v5p:1x1x1":
            raise RuntimeError("no such slice\nat line 3")
        return types.SimpleNamespace(devices="devices")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    assert lro.topology_devices("v5e:2x2") == "devices"
    assert lro.topology_devices(lro.parse_topology("v4:2x2x1")) == "devices"
    assert asked == [
        {"platform": "tpu", "topology_name": "v5e:2x2"},
        {
            "platform": "tpu",
            "topology_name": "v4:2x2x1",
            "chip_config_name": "megacore",
        },
    ]
    with pytest.raises(ValueError, match=r"a slice of v5p:1x1x1: no such slice$"):
        lro.topology_devices("v5p:1x1x1")


def test_bytes_on_one_device_are_those_of_a_real_shard():
    sizes = {"data": 2, "fsdp": 4}
    specs = {"cut": P("fsdp"), "both": P("data", "fsdp"), "whole": P()}
    arrays = {
        "cut": jnp.ones((8, 3), jnp.bfloat16),
        "both": jnp.ones((4, 8)),
        "whole": jnp.ones(5, jnp.int8),
    }

    def places(mesh):
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    real = jax.device_put(arrays, places(jax.make_mesh((2, 4), tuple(sizes))))
    expected = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real))
    shapes = jax.eval_shape(lambda: arrays)
    found = lro.bytes_per_device(shapes, places(lro.abstract_mesh(sizes)))
    assert found == expected == 2 * 3 * 2 + 2 * 2 * 4 + 5
    assert lro.bytes_per_device(shapes) == 48 + 128 + 5
    with pytest.raises(ValueError, match="fsdp"):
        lro.bytes_per_device(
            jax.ShapeDtypeStruct((6,), jnp.float32),
            NamedSharding(lro.abstract_mesh(sizes), P("fsdp")),
        )
