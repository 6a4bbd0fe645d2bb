"""`Topology` is a set of devices by name; meshes and devices that are not there.

A program can be laid out over devices that nobody has yet: shardings need an abstract
mesh, and the TPU's compiler needs the description of a slice.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

# Extents that slices come in; of v4 and v5p any three sizes make one.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TPUS = {"v4": None, "v5e": _FLAT, "v5p": None, "v6e": _FLAT}
_GPUS = ("a100", "a100-40", "h100", "h200", "rtx3090", "rtx4090", "rtx5090")
# As people write them, without spaces.
_ALSO = {
    "a100-80": "a100", "a100-80gb": "a100", "a100-40gb": "a100-40", "3090": "rtx3090",
    "4090": "rtx4090", "5090": "rtx5090",
}  # fmt: skip

# The compiler must look neither for a TPU nor for another process that has one.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      name: as it was given, such as "v5e:16x16" or "h100:8".
      chip: the name of the chip, as ``activations.hardware_profile`` takes it.
      extent: chips along each axis of a slice; of GPUs their number alone.
    """

    name: str
    chip: str
    extent: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many devices JAX sees: one a chip, of a v4 too with its two cores."""
        return math.prod(self.extent)

    @property
    def is_tpu(self) -> bool:
        """Whether it is a slice of TPUs."""
        return self.chip in _TPUS

    def larger(self) -> Iterator[str]:
        """Names larger sets of the same chip, the nearest first.

        Of v5e and v6e these are the slices that exist; elsewhere the shortest axis is
        doubled, five times.
        """
        if known := _TPUS.get(self.chip):
            text = "x".join(map(str, self.extent))
            yield from (
                f"{self.chip}:{more}" for more in known[known.index(text) + 1 :]
            )
            return
        sizes = list(self.extent)
        for _ in range(5):
            sizes[sizes.index(min(sizes))] *= 2
            yield f"{self.chip}:{'x'.join(map(str, sorted(sizes)))}"


def parse_topology(text: str) -> Topology:
    """Reads a TPU's name and its extent, or a GPU's name and a number (else one).

    Args:
      text: such as "v5e:16x16", "v4:4x4x8" or "h100:8".

    Returns:
      The topology; nothing is looked for.

    Raises:
      ValueError: if no such devices are known; the message lists those that are.

    Examples:
      >>> import lowrank_optax as lro
      >>> slice = lro.parse_topology("v5e:4x8")
      >>> slice.chip, slice.devices, list(slice.larger())
      ('v5e', 32, ['v5e:8x8', 'v5e:8x16', 'v5e:16x16'])
    """
    chip, _, extent = text.lower().replace(" ", "").partition(":")
    chip = _ALSO.get(chip, chip)
    if chip in _GPUS:
        extent = extent or "1"
    sizes = extent.split("x")
    good = all(size.isdecimal() and int(size) > 0 for size in sizes)
    if chip in _GPUS:
        good &= len(sizes) == 1
    elif chip in _TPUS:
        known = _TPUS[chip]
        good &= extent in known if known else len(sizes) == 3
    else:
        good = False
    if not good:
        raise ValueError(
            f"unknown topology {text!r}: expected v5e or v6e with an extent "
            f"({', '.join(_FLAT)}), such as v5e:16x16; v4 or v5p with three sizes, "
            f"such as v4:4x4x8; or a GPU ({', '.join(_GPUS)}) with a number, such as "
            "h100:8"
        )
    return Topology(text, chip, tuple(map(int, sizes)))


def topology_devices(topology: str | Topology) -> Any:
    """Describes the devices of a TPU slice to the TPU's own compiler.

    A mesh of what this returns can be lowered for and compiled for on a machine that
    has no TPU: ``jax.jit(f).lower(*shapes).compile()``, with shapes that carry
    shardings over the mesh, gives ``memory_analysis()`` and the program's text.
    Nothing runs. The compiler comes with the package libtpu (extra ``tpu``).

    Args:
      topology: a TPU slice, as ``parse_topology`` reads it.

    Returns:
      The devices, for ``jax.make_mesh(sizes, names, devices=...)``.

    Raises:
      ValueError: if the topology is no slice of TPUs, if the compiler is not installed
        or if it does not make such a slice.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.topology_devices("h100:8")
      Traceback (most recent call last):
      ValueError: h100:8 is no slice of TPUs (v4, v5e, v5p, v6e)
    """
    if isinstance(topology, str):
        topology = parse_topology(topology)
    if not topology.is_tpu:
        raise ValueError(f"{topology.name} is no slice of TPUs ({', '.join(_TPUS)})")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "the TPU's compiler is the package libtpu, which is not installed: pip "
            "install 'lowrank-optax[tpu]'"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The two cores of a v4 chip are one device, as on a machine that has them.
    options = {"chip_config_name": "megacore"} if topology.chip == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as error:  # whatever the compiler's plug-in raises
        said = str(error).splitlines()[0][:300]
        raise ValueError(
            f"the TPU's compiler does not make a slice of {topology.name}: {said}"
        ) from error
    return found.devices


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Makes a mesh without devices, which is enough for shardings and their bytes.

    Args:
      sizes: the length of each axis, in order. The axes are Auto: the compiler chooses
        what is said nothing of.

    Returns:
      The mesh.

    Examples:
      >>> import lowrank_optax as lro
      >>> dict(lro.abstract_mesh({"data": 2, "fsdp": 8}).shape)
      {'data': 2, 'fsdp': 8}
    """
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
