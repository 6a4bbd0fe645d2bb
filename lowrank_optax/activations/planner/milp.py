"""``solve``: the fastest assignment of actions to tags, by an integer program."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_optax.activations.checkpoint.actions import Action, Offload
from lowrank_optax.activations.planner.costs import BlockCost, TagCost
from lowrank_optax.activations.planner.hardware import Hardware

# (tag, its children, additional ms if neither it nor one of those is kept).
Joint = tuple[int, tuple[int, ...], float | int]


@dataclasses.dataclass(frozen=True)
class Tables:
    """The costs of an assignment of one action to each tag in each group, as arrays.

    Attributes:
      layers: the number of layers in each group.
      nbytes: ``[tags, actions]``, kept per layer.
      time: ``[tags, actions]``, ms per layer.
      error2: ``[tags, actions]``, squares of relative errors.
      allowed: ``[tags, actions]``.
      dropped: ``[actions]``, whether one keeps nothing, which ``joint`` is about.
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
    """Returns the tables of a block; ``error2`` is 0 where an error is not finite."""

    def table(entry: Any) -> np.ndarray:
        rows = [[entry(tag, action) for action in actions] for tag in costs.tags]
        return np.asarray(rows)

    error = table(lambda tag, action: errors[tag.tag, action])
    finite = np.isfinite(error)  # where a measurement overflowed the action is barred
    barred = table(lambda tag, action: action in forbidden.get(tag.tag, ()))
    index = {tag.tag: i for i, tag in enumerate(costs.tags)}
    joint = []
    # Linear costs know one tag at a time; the time by which a pair is dearer than its
    # parts gets an entry, and later a variable, of its own.
    for tag in costs.tags:
        alone = _again(tag.flops, tag, hardware)
        more = _again(tag.joint_flops, tag, hardware) - alone
        if tag.children and more > 0:
            joint.append((index[tag.tag], tuple(index[c] for c in tag.children), more))
    return Tables(
        layers=layers,
        nbytes=table(_nbytes).astype(float),
        time=table(lambda tag, action: _time(tag, action, hardware)),
        error2=np.where(finite, error, 0.0) ** 2,
        allowed=finite & ~barred,
        dropped=np.asarray([not action.keeps for action in actions]),
        joint=tuple(joint),
        again=math.fsum(_again(tag.joint_flops, tag, hardware) for tag in costs.tags),
    )


def _nbytes(tag: TagCost, action: Action) -> int:
    """Returns the bytes that an action keeps of all values of a tag."""
    return sum(action.nbytes(value.shape, value.dtype) for value in tag.values)


def _again(flops: float | int, tag: TagCost, hardware: Hardware) -> float:
    """Returns the ms of computing a tag again; 0 if no gradient needs it."""
    return 1e3 * hardware.seconds(flops, tag.traffic) if flops else 0.0


def _time(tag: TagCost, action: Action, hardware: Hardware) -> float:
    """Returns the ms of an action: both of its passes over the memory, or a replay."""
    if not action.keeps:
        return _again(tag.flops, tag, hardware)
    kept = _nbytes(tag, action)
    if kept >= tag.nbytes:
        return 0.0
    if isinstance(action, Offload):
        return 1e3 * 2 * tag.nbytes / hardware.host_bandwidth
    return 1e3 * 2 * (tag.nbytes + kept) / hardware.bandwidth


def solve(tables: Tables, budget: Any, error2: Any) -> np.ndarray | None:
    """Returns the fastest actions ``[groups, tags]`` within both bounds, or None.

    Args:
      tables: the costs.
      budget: of the bytes kept in all layers.
      error2: of the mean squared error; may be infinite.
    """
    # Far below the resolution of times, so that bytes and then the order of the actions
    # decide between equally fast assignments and the answer is one.
    ties = 1e-6 * _part(tables.nbytes) + 1e-8 * _part(_order(tables))
    longest = _scale(np.append(tables.time.ravel(), [t for *_, t in tables.joint]))
    weights = 1e3 * (tables.time / longest + ties)
    return _minimize(tables, weights, 1e3 / longest, budget, error2)


def smallest(tables: Tables, table: np.ndarray, error2: Any) -> np.ndarray | None:
    """Returns the actions with the smallest sum of a table within an error, or None."""
    ties = 1e-7 * _part(_order(tables))
    return _minimize(tables, 1e3 * (_part(table) + ties), 0.0, math.inf, error2)


def _order(tables: Tables) -> np.ndarray:
    return np.arange(tables.nbytes.size, dtype=float).reshape(tables.nbytes.shape)


def _scale(values: np.ndarray) -> float:
    return float(np.max(values, initial=0.0)) or 1.0


def _part(values: np.ndarray) -> np.ndarray:
    return values / _scale(values)


def _minimize(
    tables: Tables, weights: np.ndarray, joint: float, budget: Any, error2: Any
) -> np.ndarray | None:
    """Solves the program: variables ``[groups, tags, actions]``, then pairs."""
    optimize = scipy_optimize()
    groups, (tags, actions) = len(tables.layers), weights.shape
    pairs = tables.joint if joint else ()
    size = groups * tags * actions
    width = size + groups * len(pairs)
    share = np.asarray(tables.layers) / sum(tables.layers)

    # Everything is a mean per layer: a group weighs as much as it has layers.
    def row(table: np.ndarray, rest: Sequence[float] = ()) -> np.ndarray:
        each = [*np.asarray(table).ravel()]
        rest = [*rest] or [0.0] * len(pairs)
        return np.concatenate([np.kron(share, each), np.kron(share, rest)])

    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def add(values: np.ndarray, least: Any, most: Any):
        rows.append(values)
        low.append(least)
        high.append(most)

    # sum_a x[g, t, a] = 1: one action for each tag of each group.
    for i in range(groups * tags):
        one = np.zeros(width)
        one[i * actions : (i + 1) * actions] = 1
        add(one, 1, 1)
    # The two budgets. Divided by the largest entry, because the solver's tolerances are
    # absolute and bytes are numbers of ten digits.
    for table, bound in (
        (tables.nbytes, budget / sum(tables.layers)),
        (tables.error2, error2),
    ):
        if math.isfinite(bound):
            unit = max(_scale(table), 1e-300)
            add(row(table / unit), -np.inf, bound / unit)
    # y[g, pair] >= x[parent dropped] + x[child dropped] - 1: the pair's variable is 1
    # if neither is kept. It costs time, so that it is 0 otherwise, and needs no
    # integrality.
    for g in range(groups):
        for j, (parent, children, _) in enumerate(pairs):
            for child in children:
                both = np.zeros((groups, tags, actions))
                both[g, parent, tables.dropped] += 1
                both[g, child, tables.dropped] += 1
                pair = np.zeros(groups * len(pairs))
                pair[g * len(pairs) + j] = -1
                add(np.concatenate([both.ravel(), pair]), -np.inf, 1)
    allowed = np.tile(tables.allowed.ravel(), groups).astype(float)
    found = optimize.milp(
        row(weights, [joint * t for *_, t in pairs]),
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
        integrality=np.concatenate([np.ones(size), np.zeros(width - size)]),
        bounds=optimize.Bounds(0, np.concatenate([allowed, np.ones(width - size)])),
        # The default gap of 1e-4 would hide the ties.
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    # HiGHS returns 0 and 1 up to 1e-6.
    chosen = found.x[:size].reshape(groups, tags, actions).argmax(-1)
    return _sorted(chosen, tables.layers)


def _sorted(chosen: np.ndarray, layers: tuple[int, ...]) -> np.ndarray:
    """Orders the groups of one size, which are alike: one answer, long runs."""
    for size in set(layers):
        at = [i for i, n in enumerate(layers) if n == size]
        chosen[at] = sorted(chosen[at].tolist())
    return chosen


def scipy_optimize() -> Any:
    """Returns the solver's module, which is loaded here: a plan is rarely made."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(
            "Planning needs scipy: pip install 'lowrank_optax[planner]'."
        ) from error
    return optimize
