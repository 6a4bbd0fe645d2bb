"""What a compiled step takes, read from the compiler's own accounts."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Audit:
    """Bytes and operations of a compiled program, per device; printable.

    Attributes:
      argument_bytes: of the arguments.
      output_bytes: of the results, those that reuse an argument's memory included.
      alias_bytes: of the results that reuse an argument's memory (donation).
      temp_bytes: of everything between: activations, gradients, work space.
      peak_bytes: the compiler's own estimate of the most that is alive at once, or None
        if it gives none. That of a CPU leaves the temporaries out.
      flops: floating point operations, or None. The compiler counts the body of a loop
        once, however often it runs.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int | None
    flops: float | None

    @property
    def total_bytes(self) -> int:
        """Arguments, results and temporaries; reused memory counts once."""
        held = self.argument_bytes + self.output_bytes + self.temp_bytes
        return held - self.alias_bytes

    def __str__(self) -> str:
        """Returns the table."""
        rows = [
            ("arguments", _mib(self.argument_bytes)),
            ("outputs", _mib(self.output_bytes)),
            ("temporaries", _mib(self.temp_bytes)),
            ("total", _mib(self.total_bytes)),
        ]
        if self.alias_bytes:
            rows.insert(2, ("of them reused", _mib(self.alias_bytes)))
        if self.peak_bytes is not None:
            rows.append(("peak", _mib(self.peak_bytes)))
        if self.flops is not None:
            rows.append(("operations", f"{self.flops / 1e9:,.3f} GFLOP"))
        return "\n".join(f"{name:<14}  {value:>16}" for name, value in rows)


def audit(step_fn: Any, args: Any = ()) -> Audit:
    """Reads bytes and operations of a step off its compiled program.

    Args:
      step_fn: a function of arrays, jitted or not, or a program that is compiled
        already (``jax.jit(f).lower(...).compile()``).
      args: the sequence of its arguments, or ShapeDtypeStructs of them; nothing is
        executed. Not needed for a compiled program.

    Returns:
      What the compiler says. On several devices these are the bytes on one of them.

    Raises:
      TypeError: if ``step_fn`` can be neither called nor asked.
      ValueError: if the backend's compiler gives no account of memory.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import activations
      >>> found = activations.audit(lambda x, y: x @ y, [jnp.ones((64, 64))] * 2)
      >>> found.argument_bytes, found.output_bytes, found.flops
      (32768, 16384, 524288.0)
    """
    compiled = _compiled(step_fn, args)
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError(
            "This backend's compiler gives no account of memory, so there is nothing "
            "to read; compile for a CPU, GPU or TPU."
        )
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    cost = compiled.cost_analysis() or {}
    return Audit(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak or None,
        flops=cost.get("flops"),
    )


def _compiled(step_fn: Any, args: Any) -> Any:
    if hasattr(step_fn, "memory_analysis"):
        return step_fn
    if not callable(step_fn):
        raise TypeError(
            "`step_fn` must be a function or a compiled program, got "
            f"{type(step_fn).__name__}."
        )
    jitted: Any = step_fn if hasattr(step_fn, "lower") else jax.jit(step_fn)
    return jitted.lower(*args).compile()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
