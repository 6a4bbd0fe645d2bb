"""``Hardware``: operations and bytes per second of a device, by data sheet or timed."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax import _checks

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The numbers of a device that a plan depends on.

    Attributes:
      name: of the device.
      flops: operations per second of matrix products, at their best.
      bandwidth: bytes per second between the device and its own memory.
      memory_bytes: that a program can use, at most.
      host_bandwidth: bytes per second to the host's memory, in one direction.
      efficiency: the part of ``flops`` that products reach. 0.6 is a guess for training
        steps, not a measurement; ``calibrate`` measures ``flops`` and sets it to 1.
      fuses: whether the compiler leaves elementwise results out of the memory. XLA does
        for accelerators; on a CPU many of them are written.
      source: where the numbers come from.
    """

    name: str
    flops: float | int
    bandwidth: float | int
    memory_bytes: int
    host_bandwidth: float | int
    efficiency: float | int = 0.6
    fuses: bool = True
    source: str = ""

    def __post_init__(self):
        """Checks that every number is positive."""
        for field in ("flops", "bandwidth", "memory_bytes", "host_bandwidth"):
            value = getattr(self, field)
            if not value > 0:
                raise ValueError(f"`{field}` must be positive, got {value!r}.")
        if not 0 < self.efficiency <= 1:
            raise ValueError(
                "`efficiency` must be above 0 and at most 1, as a part of `flops`; got "
                f"{self.efficiency!r}."
            )

    def seconds(self, flops: float | int, traffic: float | int) -> float:
        """Returns the roofline: products or memory, whichever takes longer."""
        return max(flops / (self.flops * self.efficiency), traffic / self.bandwidth)


_TPU = (
    "cloud.google.com/tpu/docs/{}, per chip; the link is the nominal rate of PCIe "
    "generation 3 with 16 lanes"
)

_RTX = "NVIDIA's architecture paper of the GeForce RTX {}, dense; nominal rate of PCIe"

# name -> profile. Products in bfloat16 without sparsity.
HARDWARE: Mapping[str, Hardware] = {
    profile.name: profile
    for profile in (
        Hardware("v5e", 197e12, 819e9, 16 * _GIB, 15.75e9, source=_TPU.format("v5e")),
        Hardware("v4", 275e12, 1200e9, 32 * _GIB, 15.75e9, source=_TPU.format("v4")),
        Hardware("v6e", 918e12, 1640e9, 32 * _GIB, 15.75e9, source=_TPU.format("v6e")),
        Hardware("v5p", 459e12, 2765e9, 95 * _GIB, 15.75e9, source=_TPU.format("v5p")),
        Hardware(
            "a100",
            312e12,
            2039e9,
            80 * 10**9,
            31.5e9,
            source="NVIDIA A100 data sheet, 80 GB SXM; PCIe generation 4 with 16 lanes",
        ),
        Hardware(
            "a100-40",
            312e12,
            1555e9,
            40 * 10**9,
            31.5e9,
            source="NVIDIA A100 data sheet, 40 GB; PCIe generation 4 with 16 lanes",
        ),
        # Of the RTX cards the products that sum in float32.
        Hardware("rtx3090", 71e12, 936e9, 24 * 10**9, 31.5e9, source=_RTX.format(3090)),
        Hardware(
            "rtx4090", 165.2e12, 1008e9, 24 * 10**9, 31.5e9, source=_RTX.format(4090)
        ),
        Hardware(
            "rtx5090", 209.5e12, 1792e9, 32 * 10**9, 63e9, source=_RTX.format(5090)
        ),
        Hardware(
            "h100",
            989.4e12,
            3350e9,
            80 * 10**9,
            63e9,
            source="NVIDIA H100 data sheet, SXM, dense; PCIe generation 5, 16 lanes",
        ),
        Hardware(
            "h200",
            989.4e12,
            4800e9,
            141 * 10**9,
            63e9,
            source="NVIDIA H200 data sheet, SXM, dense; PCIe generation 5, 16 lanes",
        ),
        Hardware(
            "cpu",
            200e9,
            20e9,
            16 * _GIB,
            20e9,
            fuses=False,
            source="no data sheet: round numbers of a desktop, use `calibrate`",
        ),
    )
}


def hardware_profile(hardware: Any) -> Hardware:
    """Returns the profile of a name, or the profile that is given.

    Args:
      hardware: "v4", "v5e", "v5p", "v6e", "a100" (80 GB), "a100-40", "h100", "h200",
        "rtx3090", "rtx4090", "rtx5090", "cpu" or a ``Hardware``.

    Raises:
      ValueError: if the name is unknown.

    Examples:
      >>> from lowrank_optax import activations
      >>> v5e = activations.hardware_profile("v5e")
      >>> v5e.flops, v5e.bandwidth
      (197000000000000.0, 819000000000.0)
    """
    if isinstance(hardware, Hardware):
        return hardware
    return HARDWARE[_checks.choice("hardware", hardware, HARDWARE)]


def calibrate(size: Any = 2048, *, dtype: Any = None, repeats: Any = 5) -> Hardware:
    """Times the default device: one product, one copy, one transfer to the host.

    Args:
      size: of the square matrices of the product; the copy moves 16 times as many
        elements. Large enough to fill the device: 8192 on a GPU or TPU.
      dtype: of the matrices; None: bfloat16, or float32 on a CPU.
      repeats: the fastest of so many runs counts.

    Returns:
      A profile of the measurements, with ``efficiency=1``.

    Examples:
      >>> from lowrank_optax import activations
      >>> here = activations.calibrate(64, repeats=1)
      >>> here.flops > 0 and here.bandwidth > 0
      True
    """
    size = _checks.positive_int("size", size)
    repeats = _checks.positive_int("repeats", repeats)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    dtype = jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))
    matrix = jnp.ones((size, size), dtype)
    long = jnp.ones((16, size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    copy = jax.jit(lambda x: x + 1)
    # Read once and written once.
    moved = 2 * long.nbytes
    # A new array object each time: one that was read keeps its copy on the host.
    to_host = _fastest(lambda: np.array(jax.device_put(long), copy=True), repeats)
    return Hardware(
        name=str(device.device_kind),
        flops=2 * size**3 / _fastest(lambda: product(matrix), repeats),
        bandwidth=moved / _fastest(lambda: copy(long), repeats),
        memory_bytes=_memory(device),
        host_bandwidth=long.nbytes / to_host,
        efficiency=1.0,
        fuses=not on_cpu,
        source=f"timed with matrices of {size} in {dtype.name}",
    )


def _fastest(run: Callable, repeats: int) -> float:
    jax.block_until_ready(run())  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _memory(device: Any) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
