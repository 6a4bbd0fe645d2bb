"""``ActivationPlan``: an action and its cost for every tag and layer, and its use."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.activations.checkpoint.actions import (
    Action,
    Quantize,
    parse_action,
)
from lowrank_optax.activations.checkpoint.policy import Policy
from lowrank_optax.activations.checkpoint.replay import compressed_checkpoint


@dataclasses.dataclass(frozen=True)
class Choice:
    """The action for the values of one tag in a layer, and its costs.

    Attributes:
      tag: its name.
      action: that they get.
      nbytes: that are kept.
      saved_bytes: of the values as they are.
      time_ms: predicted, of computing again or of encoding and decoding. What runs
        again for several tags is charged to the first of them.
      error: bound on the relative error of the layer's gradient, from this tag alone.
    """

    tag: str
    action: Action
    nbytes: int
    saved_bytes: int
    time_ms: float
    error: float


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of layers with the same choices.

    Attributes:
      layers: how many.
      choices: one per tag.
    """

    layers: int
    choices: tuple[Choice, ...]

    @property
    def policy(self) -> Policy:
        """The policy for ``compressed_checkpoint``, without recomputed tags."""
        return Policy({c.tag: c.action for c in self.choices if c.action.keeps})


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes, time and error of all layers together, per device and step.

    Attributes:
      kept_bytes: of the tagged values.
      input_bytes: of the inputs of all layers, which are always kept.
      working_bytes: the most that the backward pass of one layer holds at once.
      time_ms: beyond that of keeping every tagged value. By the roofline of the
        hardware profile, not measured.
      error: bound on the relative error of a layer's gradient, the mean over the
        layers in squares. Each tag is tried while all that is computed from it is
        computed again from the rounded values, and a plan that keeps those as well
        rounds less: its own error was 2 to 4 times smaller than a bound from data, and
        4 to 12 times smaller than one by role.
    """

    kept_bytes: int
    input_bytes: int
    working_bytes: int
    time_ms: float
    error: float

    @property
    def total_bytes(self) -> int:
        """The sum of the three."""
        return self.kept_bytes + self.input_bytes + self.working_bytes


@dataclasses.dataclass(frozen=True)
class ActivationPlan:
    """The decision of ``plan_activations``; printable, hashable, and JSON.

    Attributes:
      segments: runs of layers with a policy each, from the first layer to the last.
      predicted: their cost.
      full_save: the cost of keeping every tagged value.
      full_recompute: the cost of keeping none.
      budget_bytes: that the plan had to keep, for ``predicted.total_bytes``.
      hardware: the name of the profile.
      probed: whether the bounds come from errors measured on data; otherwise they are
        by role.
    """

    segments: tuple[Segment, ...]
    predicted: Prediction
    full_save: Prediction
    full_recompute: Prediction
    budget_bytes: int
    hardware: str
    probed: bool

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return sum(segment.layers for segment in self.segments)

    def table(self) -> str:
        """Returns every choice and the totals as text."""
        lines = []
        first = 0
        for segment in self.segments:
            last = first + segment.layers - 1
            lines.append(f"layers {first} to {last}, each:")
            lines.append(_row("tensor", "action", "MiB", "ms", "bound"))
            for c in segment.choices:
                numbers = _mib(c.nbytes), f"{c.time_ms:.4f}", f"{c.error:.4f}"
                lines.append(_row(c.tag, str(c.action), *numbers))
            first = last + 1
        source = "probed" if self.probed else "by role"
        lines.append(f"all layers ({self.hardware}, bounds on the error {source}):")
        lines.append(_row("", "", "MiB", "ms", "bound"))
        for name, found in (
            ("this plan", self.predicted),
            ("save everything", self.full_save),
            ("recompute everything", self.full_recompute),
        ):
            numbers = f"{found.time_ms:.3f}", f"{found.error:.4f}"
            lines.append(_row(name, "", _mib(found.total_bytes), *numbers))
        parts = self.predicted
        lines.append(
            f"this plan: kept {_mib(parts.kept_bytes)} MiB, inputs of layers "
            f"{_mib(parts.input_bytes)} MiB, working set "
            f"{_mib(parts.working_bytes)} MiB; budget {_mib(self.budget_bytes)} MiB"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        """Returns the table."""
        return self.table()

    def to_json(self) -> str:
        """Returns the plan as JSON, for the record of a run.

        Raises:
          TypeError: if it has actions that are not this package's own.
        """
        data = dataclasses.asdict(self)
        for segment, entry in zip(self.segments, data["segments"], strict=True):
            for c, fields in zip(segment.choices, entry["choices"], strict=True):
                fields["action"] = _as_json(c)
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ActivationPlan":
        """Returns the plan that ``to_json`` wrote.

        Raises:
          ValueError: if the text is something else.
        """
        try:
            data = json.loads(text)
            data["segments"] = tuple(
                Segment(
                    s["layers"],
                    tuple(
                        _typed(Choice, c | {"action": _from_json(c["action"])})
                        for c in s["choices"]
                    ),
                )
                for s in data["segments"]
            )
            for segment in data["segments"]:
                _typed(Segment, vars(segment))
            for name in ("predicted", "full_save", "full_recompute"):
                data[name] = _typed(Prediction, data[name])
            return _typed(cls, data)
        except (
            AttributeError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"expected the JSON that ActivationPlan.to_json writes ({error})"
            ) from error


def _typed(kind: Any, data: Any) -> Any:
    """Returns a dataclass of numbers, flags and names that are of their types."""
    made = kind(**data)
    for field in dataclasses.fields(kind):
        value = getattr(made, field.name)
        if field.type is float and type(value) is int:
            value = float(value)
        if field.type in (int, float, str, bool) and type(value) is not field.type:
            raise TypeError(f"{field.name}: expected {field.type}, got {value!r}")
        if type(value) is int and not 0 <= value < 2**63:
            raise ValueError(f"{field.name}: no number of bytes or layers")
    return made


def _row(name: str, action: str, *numbers: str) -> str:
    cells = "".join(f"{number:>12}" for number in numbers)
    return f"  {name:<20} {action:<12}{cells}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.3f}"


def _as_json(choice: Choice) -> Any:
    """Returns an action as JSON can hold it."""
    action = choice.action
    if isinstance(action, Quantize):
        return dataclasses.asdict(action)
    try:
        named = parse_action(str(action))
    except ValueError:
        named = None
    # An action of another class may call itself "save", and JSON would lose the class.
    if named != action:
        raise TypeError(
            f"The action {action!r} of '{choice.tag}' is not one of this package's "
            "own, so JSON cannot name it; record str(plan) instead."
        )
    return str(action)


def _from_json(data: Any) -> Action:
    return Quantize(**data) if isinstance(data, dict) else parse_action(data)


def apply_plan(block: Callable, plan: ActivationPlan) -> tuple[Callable, ...]:
    """Returns the block under the plan's policies, one per segment of layers.

    Args:
      block: ``block(params, x, *rest)`` with the plan's tags.
      plan: from ``plan_activations``.

    Returns:
      Functions like ``block``, see ``compressed_checkpoint``; that of segment i is for
      its ``plan.segments[i].layers`` layers.
    """
    return tuple(compressed_checkpoint(block, s.policy) for s in plan.segments)


def scan_layers(
    block: Callable, plan: ActivationPlan, stacked_params: Any, x: Any, *rest: Any
) -> Any:
    """Runs a stack of layers under a plan: one ``jax.lax.scan`` per segment.

    Args:
      block: ``block(params, x, *rest)``, which returns the next ``x``.
      plan: from ``plan_activations``.
      stacked_params: parameters with a leading axis of all layers. Other arrays that
        differ between layers, keys for dropout say, belong here as well.
      x: the input of the first layer.
      *rest: further arguments, the same for all layers.

    Returns:
      The result of the last layer.

    Raises:
      ValueError: if the leading axis is not that of the plan.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     return jnp.tanh(checkpoint_name(x @ w, "hidden"))
      >>> w, x = jnp.stack([jnp.eye(64)] * 4), jnp.ones((8, 64))
      >>> plan = activations.plan_activations(
      ...     layer, (w[0], x), 4, budget_fraction=0.5
      ... )
      >>> activations.scan_layers(layer, plan, w, x).shape
      (8, 64)
    """
    for path, leaf in jax.tree.leaves_with_path(stacked_params):
        if leaf.ndim < 1 or leaf.shape[0] != plan.n_layers:
            raise ValueError(
                f"The plan is for {plan.n_layers} layers, so every parameter must have "
                f"a leading axis of that size; params{jax.tree_util.keystr(path)} has "
                f"the shape {leaf.shape}."
            )
    first = 0
    for segment, body in zip(plan.segments, apply_plan(block, plan), strict=True):
        last = first + segment.layers
        part = stacked_params
        # A slice is a copy of the parameters: one segment scans the stack itself.
        if len(plan.segments) > 1:
            part = jax.tree.map(
                lambda p, a=first, b=last: jax.lax.slice_in_dim(p, a, b), part
            )
        x, _ = jax.lax.scan(lambda x, p, f=body: (f(p, x, *rest), None), x, part)
        first = last
    return x
