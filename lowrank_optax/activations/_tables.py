"""The costs of every action on every tag as arrays, for the planner."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_optax.activations.actions import Action, Offload
from lowrank_optax.activations.cost import BlockCost, TagCost
from lowrank_optax.activations.hardware import Hardware
from lowrank_optax.activations.plan import ActivationPlan, Choice, Prediction, Segment

# (tag, its children, additional ms if neither it nor one of those is kept).
Joint = tuple[int, tuple[int, ...], float | int]


@dataclasses.dataclass(frozen=True)
class Tables:
    """What an assignment of one action to each tag, in each group, costs.

    Attributes:
      layers: the number of layers in each group.
      nbytes: ``[tags, actions]``, kept per layer.
      time: ``[tags, actions]``, ms per layer.
      error2: ``[tags, actions]``, squares of relative errors.
      allowed: ``[tags, actions]``.
      dropped: ``[actions]``, those that keep nothing: what ``joint`` is about.
      joint: time that is not a sum over tags.
      again: ms of a layer of which nothing is kept.
    """

    layers: tuple[int, ...]
    nbytes: np.ndarray
    time: np.ndarray
    error2: np.ndarray
    allowed: np.ndarray
    dropped: np.ndarray
    joint: tuple[Joint, ...] = ()
    again: float = 0.0

    def total(self, assignment: np.ndarray) -> tuple[float, float, float]:
        """Returns bytes, ms, mean squared error of actions ``[groups, tags]``."""
        tags = np.arange(self.nbytes.shape[0])
        nbytes = time = error2 = 0.0
        for layers, chosen in zip(self.layers, assignment, strict=True):
            nbytes += layers * self.nbytes[tags, chosen].sum()
            each = self.time[tags, chosen].sum()
            gone = self.dropped[chosen]
            each += sum(t for p, c, t in self.joint if gone[p] and gone[list(c)].any())
            time += layers * each
            error2 += layers * self.error2[tags, chosen].sum()
        return float(nbytes), float(time), float(error2 / sum(self.layers))


def build(
    costs: BlockCost,
    actions: Sequence[Action],
    layers: tuple[int, ...],
    hardware: Hardware,
    errors: Mapping[tuple[str, Action], float],
    forbidden: Mapping[str, Sequence[Action]],
) -> Tables:
    """Returns the tables of a block."""

    def table(entry: Any) -> np.ndarray:
        rows = [[entry(tag, action) for action in actions] for tag in costs.tags]
        return np.asarray(rows)

    error = table(lambda tag, action: errors[tag.tag, action])
    finite = np.isfinite(error)
    barred = table(lambda tag, action: action in forbidden.get(tag.tag, ()))
    index = {tag.tag: i for i, tag in enumerate(costs.tags)}
    joint = []
    for tag in costs.tags:
        alone = _again(tag.flops, tag, hardware)
        more = _again(tag.joint_flops, tag, hardware) - alone
        if tag.children and more > 0:
            joint.append((index[tag.tag], tuple(index[c] for c in tag.children), more))
    return Tables(
        layers=layers,
        nbytes=table(nbytes).astype(float),
        time=table(lambda tag, action: _time(tag, action, hardware)),
        error2=np.where(finite, error, 0.0) ** 2,
        allowed=finite & ~barred,
        dropped=np.asarray([not action.keeps for action in actions]),
        joint=tuple(joint),
        again=math.fsum(_again(tag.joint_flops, tag, hardware) for tag in costs.tags),
    )


def nbytes(tag: TagCost, action: Action) -> int:
    """Returns what an action keeps of all values of a tag."""
    return sum(action.nbytes(value.shape, value.dtype) for value in tag.values)


def _again(flops: float | int, tag: TagCost, hardware: Hardware) -> float:
    """Returns the ms of computing a tag again; nothing if nothing needs it."""
    return 1e3 * hardware.seconds(flops, tag.traffic) if flops else 0.0


def _time(tag: TagCost, action: Action, hardware: Hardware) -> float:
    """Returns the ms of an action: both of its passes over the memory, or a replay."""
    if not action.keeps:
        return _again(tag.flops, tag, hardware)
    if nbytes(tag, action) >= tag.nbytes:
        return 0.0
    if isinstance(action, Offload):
        return 1e3 * 2 * tag.nbytes / hardware.host_bandwidth
    return 1e3 * 2 * (tag.nbytes + nbytes(tag, action)) / hardware.bandwidth


def plan_of(
    assignment: np.ndarray,
    tables: Tables,
    costs: BlockCost,
    actions: Sequence[Action],
    budget_bytes: int,
    hardware: str,
    probed: bool,
) -> ActivationPlan:
    """Returns the plan of ``[groups, tags]`` indices of actions."""
    n_layers = sum(tables.layers)

    def predict(nbytes: Any, time: Any, error2: Any) -> Prediction:
        inputs = n_layers * costs.input_bytes
        error = math.sqrt(error2)
        return Prediction(int(nbytes), inputs, costs.working_bytes, float(time), error)

    everything = n_layers * sum(tag.nbytes for tag in costs.tags)
    return ActivationPlan(
        segments=_segments(assignment, tables, costs, actions),
        predicted=predict(*tables.total(assignment)),
        full_save=predict(everything, 0.0, 0.0),
        full_recompute=predict(0, n_layers * tables.again, 0.0),
        budget_bytes=budget_bytes,
        hardware=hardware,
        probed=probed,
    )


def _segments(
    assignment: np.ndarray, tables: Tables, costs: BlockCost, actions: Sequence[Action]
) -> tuple[Segment, ...]:
    found: list[Segment] = []
    for layers, chosen in zip(tables.layers, assignment.tolist(), strict=True):
        choices = tuple(
            Choice(
                tag=tag.tag,
                action=actions[a],
                nbytes=int(tables.nbytes[t, a]),
                saved_bytes=tag.nbytes,
                time_ms=float(tables.time[t, a]),
                error=math.sqrt(tables.error2[t, a]),
            )
            for t, (tag, a) in enumerate(zip(costs.tags, chosen, strict=True))
        )
        if found and found[-1].choices == choices:
            layers += found.pop().layers
        found.append(Segment(layers, choices))
    return tuple(found)
