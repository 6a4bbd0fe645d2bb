"""A plan: what becomes of every tagged value, layer by layer, and what it costs."""

import dataclasses
import json
from typing import Any

from lowrank_optax.activations.actions import Action, Policy, Quantize, parse_action


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of the values of one tag in a layer.

    Attributes:
      tag: its name.
      action: what is done.
      nbytes: that are kept.
      saved_bytes: of the values as they are.
      time_ms: predicted, of computing again or of encoding and decoding.
      error: of the layer's gradient, from this tag alone.
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
        """What ``compressed_checkpoint`` takes; what is computed again is left out."""
        return Policy({c.tag: c.action for c in self.choices if c.action.keeps})


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What all layers take together, per device and step.

    Attributes:
      kept_bytes: of the tagged values.
      input_bytes: of the inputs of all layers, which are always kept.
      working_bytes: the most that the backward pass of one layer holds at once.
      time_ms: beyond that of keeping every tagged value. By the roofline of the
        hardware profile, not measured.
      error: relative, of a layer's gradient: the mean over the layers in squares.
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
    """What ``plan_activations`` decided; printable, hashable, and JSON.

    Attributes:
      segments: runs of layers with a policy each, from the first layer to the last.
      predicted: what they take.
      full_save: what keeping every tagged value takes.
      full_recompute: what keeping none takes.
      budget_bytes: that the plan had to keep, for ``predicted.total_bytes``.
      hardware: the name of the profile.
      probed: whether the errors were measured on data; otherwise they are by role.
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
            lines.append(_row("tensor", "action", "MiB", "ms", "error"))
            for c in segment.choices:
                lines.append(_choice_row(c))
            first = last + 1
        source = "probed" if self.probed else "by role"
        lines.append(f"all layers ({self.hardware}, errors {source}):")
        lines.append(_row("", "", "MiB", "ms", "error"))
        for name, found in (
            ("this plan", self.predicted),
            ("save everything", self.full_save),
            ("recompute everything", self.full_recompute),
        ):
            mib = _mib(found.total_bytes)
            lines.append(_row(name, "", mib, f"{found.time_ms:.3f}", _e(found.error)))
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
                fields["action"] = _plain(c)
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ActivationPlan":
        """Returns the plan that ``to_json`` wrote."""
        data = json.loads(text)
        segments = tuple(
            Segment(
                s["layers"],
                tuple(
                    Choice(**c | {"action": _action(c["action"])}) for c in s["choices"]
                ),
            )
            for s in data.pop("segments")
        )
        for name in ("predicted", "full_save", "full_recompute"):
            data[name] = Prediction(**data[name])
        return cls(segments=segments, **data)


def _row(name: str, action: str, *numbers: str) -> str:
    cells = "".join(f"{number:>12}" for number in numbers)
    return f"  {name:<20} {action:<12}{cells}"


def _choice_row(c: Choice) -> str:
    numbers = _mib(c.nbytes), f"{c.time_ms:.4f}", _e(c.error)
    return _row(c.tag, str(c.action), *numbers)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.3f}"


def _e(error: float) -> str:
    return f"{error:.4f}"


def _plain(choice: Choice) -> Any:
    """Returns an action as JSON can hold it."""
    action = choice.action
    if isinstance(action, Quantize):
        return dataclasses.asdict(action)
    if _parse_or_none(str(action)) != action:
        raise TypeError(
            f"The action {action!r} of '{choice.tag}' is not one of this package's "
            "own, so JSON cannot name it; record str(plan) instead."
        )
    return str(action)


def _parse_or_none(text: str) -> Action | None:
    """Returns the action that a string names, None if it names none."""
    try:
        return parse_action(text)
    except ValueError:
        return None


def _action(data: Any) -> Action:
    return Quantize(**data) if isinstance(data, dict) else parse_action(data)
