"""``audit``: bytes and operations of a compiled step, from the compiler's accounts."""

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
      predicted_bytes: of the activations, by the planner's count, if it was given.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int | None
    flops: float | None
    predicted_bytes: int | None = None

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
        if self.predicted_bytes is not None:
            ratio = self.predicted_bytes / max(self.temp_bytes, 1)
            rows.append(("predicted", _mib(self.predicted_bytes)))
            rows.append(("of temporaries", f"{100 * ratio:.0f} %"))
        if self.peak_bytes is not None:
            rows.append(("peak", _mib(self.peak_bytes)))
        if self.flops is not None:
            rows.append(("operations", f"{self.flops / 1e9:,.3f} GFLOP"))
        return "\n".join(f"{name:<14}  {value:>16}" for name, value in rows)


def audit(step_fn: Any, args: Any = (), predicted: Any = None) -> Audit:
    """Reads bytes and operations of a step off its compiled program.

    With a prediction the table sets it against the compiled temporaries. These also
    hold other arrays than the layers' activations: logits, gradients, the optimizer's
    work space. For the layers alone audit the gradient of a loss that needs nothing
    else.

    Args:
      step_fn: a function of arrays, jitted or not, or a program that is compiled
        already (``jax.jit(f).lower(...).compile()``).
      args: the sequence of its arguments, or ShapeDtypeStructs of them; nothing is
        executed. Not needed for a compiled program.
      predicted: a plan, or a ``Prediction`` from ``predict``; one per policy that is
        compared.

    Returns:
      The compiler's figures. On several devices these are the bytes on one of them.

    Raises:
      TypeError: if ``step_fn`` can be neither called nor asked.
      ValueError: if the backend's compiler gives no account of memory.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import activations
      >>> found = activations.audit(lambda x, y: x @ y, [jnp.ones((64, 64))] * 2)
      >>> found.argument_bytes, found.output_bytes, found.flops
      (32768, 16384, 524288.0)

      A policy's prediction against the compiled program:

      >>> import jax
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> def layer(w, x):
      ...     return x + jnp.sin(checkpoint_name(x @ w, "hidden")) @ w.T
      >>> w, x = jnp.ones((8, 64, 256)), jnp.ones((512, 64))
      >>> def gradient(policy):
      ...     body = activations.compressed_checkpoint(layer, policy)
      ...     def loss(w, x):
      ...         return jax.lax.scan(lambda x, w: (body(w, x), None), x, w)[0].sum()
      ...     return jax.grad(loss)
      >>> for policy in ({"hidden": "save"}, {"hidden": "int8"}):
      ...     expected = activations.predict(layer, (w[0], x), 8, policy)
      ...     found = activations.audit(gradient(policy), (w, x), expected)
      ...     print(0.8 < found.predicted_bytes / found.temp_bytes < 1.25)
      True
      True
    """
    compiled = _compiled(step_fn, args)
    predicted = getattr(predicted, "predicted", predicted)  # of a plan
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError(
            "This backend's compiler gives no account of memory, so there is nothing "
            "to read; compile for a CPU, GPU or TPU."
        )
    # Absent in some versions of JAX, and 0 where the backend does not estimate it.
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    cost = compiled.cost_analysis() or {}
    return Audit(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak or None,
        flops=cost.get("flops"),
        predicted_bytes=None if predicted is None else predicted.total_bytes,
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
