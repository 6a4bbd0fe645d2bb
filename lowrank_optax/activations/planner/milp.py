"""``solve``: the fastest assignment of actions to tags, by an integer program."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_optax.activations.checkpoint.actions import Action, Offload
from lowrank_optax.activations.planner.costs import BlockCost, TagCost
from lowrank_optax.activations.planner.hardware import Hardware

# (tag, whether the backward pass itself reads the value, later values that need it).
Value = tuple[int, bool, tuple[int, ...]]
# (values, ms if one of them is computed again).
Shared = tuple[tuple[int, ...], float | int]


@dataclasses.dataclass(frozen=True)
class Tables:
    """The costs of an assignment of one action to each tag in each group, as arrays.

    Attributes:
      layers: the number of layers in each group.
      nbytes: ``[tags, actions]``, kept per layer.
      time: ``[tags, actions]``, ms per layer, of encoding and decoding.
      error2: ``[tags, actions]``, squares of relative errors.
      allowed: ``[tags, actions]``.
      dropped: ``[actions]``, whether one keeps nothing.
      values: the tagged values; one is computed again if it is not kept, and the
        backward pass or a later value that is computed again needs it.
      shared: the time of that, which is no sum over tags: one product may lead to
        several values, and a value may be needed by another one alone.
    """

    layers: tuple[int, ...]
    nbytes: np.ndarray
    time: np.ndarray
    error2: np.ndarray
    allowed: np.ndarray
    dropped: np.ndarray
    values: tuple[Value, ...] = ()
    shared: tuple[Shared, ...] = ()

    def again(self, gone: np.ndarray) -> float:
        """Returns the ms of computing again, ``gone``: which tags are not kept."""
        runs = [False] * len(self.values)
        # From the last one: only later values need an earlier one.
        for k in reversed(range(len(runs))):
            tag, always, users = self.values[k]
            runs[k] = bool(gone[tag]) and (always or any(runs[j] for j in users))
        return math.fsum(
            ms for values, ms in self.shared if any(runs[k] for k in values)
        )

    def times(self, chosen: np.ndarray) -> list[float]:
        """Returns the ms of every tag of a layer; their sum is the layer's.

        Of what runs again for several tags, the first of them is charged.
        """
        gone, found, before = np.zeros(len(chosen), bool), [], 0.0
        for tag, action in enumerate(chosen):
            gone[tag] = self.dropped[action]
            now = self.again(gone)
            found.append(float(self.time[tag, action]) + now - before)
            before = now
        return found

    def total(self, assignment: np.ndarray) -> tuple[float, float, float]:
        """Returns bytes, ms, mean squared error of actions ``[groups, tags]``."""
        tags = np.arange(self.nbytes.shape[0])
        nbytes = time = error2 = 0.0
        for layers, chosen in zip(self.layers, assignment, strict=True):
            nbytes += layers * self.nbytes[tags, chosen].sum()
            each = self.time[tags, chosen].sum() + self.again(self.dropped[chosen])
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
    return Tables(
        layers=layers,
        nbytes=table(_nbytes).astype(float),
        time=table(lambda tag, action: _time(tag, action, hardware)),
        error2=np.where(finite, error, 0.0) ** 2,
        allowed=finite & ~barred,
        dropped=np.asarray([not action.keeps for action in actions]),
        values=tuple((index[k.tag], k.always, k.users) for k in costs.links),
        shared=tuple(
            (run.values, 1e3 * hardware.seconds(run.flops, run.traffic))
            for run in costs.reruns
        ),
    )


def _nbytes(tag: TagCost, action: Action) -> int:
    """Returns the bytes that an action keeps of all values of a tag."""
    return sum(action.nbytes(value.shape, value.dtype) for value in tag.values)


def _time(tag: TagCost, action: Action, hardware: Hardware) -> float:
    """Returns the ms of an action's two passes over the memory."""
    if not action.keeps:
        return 0.0  # what runs again is shared between tags
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
    longest = _scale(np.append(tables.time.ravel(), [t for _, t in tables.shared]))
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
    tables: Tables, weights: np.ndarray, again: float, budget: Any, error2: Any
) -> np.ndarray | None:
    """Solves the program.

    Its variables are ``x[groups, tags, actions]``, and per group whether each tagged
    value is computed again, and each set of values that share work.
    """
    optimize = scipy_optimize()
    groups, (tags, actions) = len(tables.layers), weights.shape
    values = tables.values if again else ()
    joint = [s for s in tables.shared if again and len(s[0]) > 1]
    more = len(values) + len(joint)
    cost = [
        math.fsum(t for s, t in tables.shared if s == (k,)) for k in range(len(values))
    ]
    cost += [t for _, t in joint]
    size = groups * tags * actions
    width = size + groups * more
    share = np.asarray(tables.layers) / sum(tables.layers)

    # Everything is a mean per layer: a group weighs as much as it has layers.
    def row(table: np.ndarray, rest: Sequence[float] = ()) -> np.ndarray:
        each = [*np.asarray(table).ravel()]
        rest = [*rest] or [0.0] * more
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
    # y[g, k] >= x[dropped] if the backward pass needs value k, y[g, k] >= x[dropped] +
    # y[g, j] - 1 if value j does, z[g, set] >= y[g, k] for k in the set. They cost
    # time, so that they are 0 otherwise, and need no integrality.
    for g in range(groups):

        def at_most(tag: int | None, plus: int | None, minus: int, bound: float, g=g):
            gone = np.zeros((groups, tags, actions))
            if tag is not None:
                gone[g, tag, tables.dropped] = 1
            rest = np.zeros((groups, more))
            if plus is not None:
                rest[g, plus] = 1
            rest[g, minus] = -1
            add(np.concatenate([gone.ravel(), rest.ravel()]), -np.inf, bound)

        for k, (tag, always, users) in enumerate(values):
            if always:
                at_most(tag, None, k, 0.0)
                continue
            for j in users:
                at_most(tag, j, k, 1.0)
        for s, (members, _) in enumerate(joint):
            for k in members:
                at_most(None, k, len(values) + s, 0.0)
    allowed = np.tile(tables.allowed.ravel(), groups).astype(float)
    found = optimize.milp(
        row(weights, [again * t for t in cost]),
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
