"""The cheapest way to keep activations within a budget: a small integer program."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank_optax import _checks
from lowrank_optax.activations import _errors, _requests, _tables, cost
from lowrank_optax.activations._tables import Tables
from lowrank_optax.activations.checkpoint import _HOW_TO_TAG
from lowrank_optax.activations.hardware import hardware_profile
from lowrank_optax.activations.plan import ActivationPlan
from lowrank_optax.activations.roles import TRANSFORMER_TAGS

ACTIONS = ("save", "recompute", "int8", "int4", "int4+8")


def plan_activations(
    block: Callable,
    example_args: Any,
    n_layers: Any,
    *,
    budget_bytes: Any = None,
    budget_fraction: Any = None,
    error_budget: Any = None,
    hardware: Any = "cpu",
    actions: Any = ACTIONS,
    roles: Any = TRANSFORMER_TAGS,
    forbidden: Any = None,
    errors: Any = None,
    cotangent: Any = None,
    groups: Any = 1,
) -> ActivationPlan:
    r"""Chooses for every tagged value of a stack of layers whether and how it is kept.

    With one action ``a`` for each tag ``t`` in each group ``g`` of ``L_g`` of the L
    layers, ``x[g, t, a]`` in {0, 1} and the working set ``W``, it solves::

        min   sum_g L_g sum_ta time[t, a] x[g, t, a]
        with  sum_a x[g, t, a] = 1
              sum_g L_g (inputs + sum_ta bytes[t, a] x[g, t, a]) + W <= budget
              sum_g (L_g / L) sum_ta error[t, a]^2 x[g, t, a] <= error_budget^2

    The bytes are exact. The times are those of a roofline: computing again costs its
    products or its traffic, whichever is longer (see ``block_cost``), few bits cost one
    pass for encoding and one for decoding. W is an estimate, see ``BlockCost``. Errors
    are measured on ``example_args``, one tag at a time, and add in squares.

    A tag that only another tag needs (one that is added to something, say) costs time
    only if that one is not kept either; this enters as a further variable for the pair.
    Of equally fast plans the one with fewer bytes is taken, and then the one whose
    actions stand first in ``actions``.

    Args:
      block: ``block(params, x, *rest)``, a layer that tags values with
        ``jax.ad_checkpoint.checkpoint_name``.
      example_args: the parameters of one layer, what goes into it, and the rest: real
        data, from which errors are measured, or ShapeDtypeStructs.
      n_layers: how many layers the stack has.
      budget_bytes: for what ``plan.predicted.total_bytes`` counts.
      budget_fraction: instead of that, in (0, 1]: the tagged values may take this part
        of what saving all of them takes. Inputs and the working set come on top.
      error_budget: the largest relative error of a layer's gradient; None: any.
      hardware: a profile's name, or a ``Hardware``, as from ``calibrate``.
      actions: what may be chosen: strings or ``Action`` objects.
      roles: tag -> role, for errors without data; see ``transformer_policy``.
      forbidden: tag -> actions that it may not get.
      errors: (tag, action) -> error, in place of those that would be measured; as
        ``probe_errors`` returns them.
      cotangent: of the loss at this layer, for the measurement; see ``probe_errors``.
      groups: into how many runs of layers the stack may be cut, each with a policy and
        a loop of its own. Runs with equal policies are joined.

    Returns:
      The plan; print it.

    Raises:
      ImportError: if scipy is missing.
      ValueError: if not exactly one budget is given, if it or the error budget cannot
        be kept (the message names the smallest that can), if the block has no tags that
        can be kept, or if an argument is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     hidden = checkpoint_name(x @ w["in"], "hidden")
      ...     act = checkpoint_name(jax.nn.silu(hidden), "act")
      ...     return x + act @ w["out"]
      >>> def shape(*axes):
      ...     return jax.ShapeDtypeStruct(axes, jnp.bfloat16)
      >>> args = {"in": shape(1024, 4096), "out": shape(4096, 1024)}, shape(512, 1024)
      >>> plan = activations.plan_activations(
      ...     layer, args, 12, budget_fraction=0.3, hardware="v5e"
      ... )
      >>> [(choice.tag, str(choice.action)) for choice in plan.segments[0].choices]
      [('hidden', 'int4'), ('act', 'recompute')]

    References:
      Chen et al., Adacc: An Adaptive Framework Unifying Compression and Activation
      Recomputation for LLM Training (2025), https://arxiv.org/abs/2508.00806
    """
    n_layers = _checks.positive_int("n_layers", n_layers)
    profile = hardware_profile(hardware)
    _requests.check_budgets(budget_bytes, budget_fraction, error_budget)
    actions = _requests.parse(actions)
    layers = _requests.sizes(n_layers, groups)
    example_args = _requests.check_args(example_args)
    _scipy()
    costs = cost.block_cost(block, example_args, profile.fuses)
    if not costs.tags:
        raise ValueError(
            "The block tags nothing that can be kept, so there is nothing to plan. "
            f"{_HOW_TO_TAG} Tags inside loops and branches do not count."
        )
    barred = _requests.check_tags(forbidden or {}, roles, costs, actions)
    errors, probed = _errors.settle(
        block, example_args, n_layers, costs, actions, roles, errors, cotangent
    )
    tables = _tables.build(costs, actions, layers, profile, errors, barred)
    always = n_layers * costs.input_bytes + costs.working_bytes
    everything = n_layers * sum(tag.nbytes for tag in costs.tags)
    if budget_bytes is None:
        budget_bytes = always + math.ceil(budget_fraction * everything)
    _check_feasible(tables, budget_bytes, error_budget, always, everything)
    chosen = solve(tables, budget_bytes - always, _square(error_budget))
    if chosen is None:
        raise RuntimeError("The solver found no plan though there is one.")
    return _tables.plan_of(
        chosen, tables, costs, actions, int(budget_bytes), profile.name, probed
    )


def _check_feasible(
    tables: Tables, budget: Any, error_budget: Any, always: int, everything: int
):
    """Raises if no plan keeps the budgets, and says which would do."""
    best = smallest(tables, tables.error2, math.inf)
    least = math.sqrt(tables.total(best)[2]) if best is not None else math.inf
    if least > math.sqrt(_square(error_budget)) * (1 + 1e-6):
        raise ValueError(_requests.infeasible_error(least, error_budget))
    best = smallest(tables, tables.nbytes, _square(error_budget))
    needed = always + (tables.total(best)[0] if best is not None else everything)
    if needed > budget:
        raise ValueError(
            _requests.infeasible_budget(needed, always, everything, budget)
        )


def solve(tables: Tables, budget: Any, error2: Any) -> np.ndarray | None:
    """Returns the fastest actions ``[groups, tags]`` within both bounds, or None.

    Args:
      tables: the costs.
      budget: of the bytes kept in all layers.
      error2: of the mean squared error; may be infinite.
    """
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
    optimize = _scipy()
    groups, (tags, actions) = len(tables.layers), weights.shape
    pairs = tables.joint if joint else ()
    size = groups * tags * actions
    width = size + groups * len(pairs)
    share = np.asarray(tables.layers) / sum(tables.layers)

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

    for i in range(groups * tags):
        one = np.zeros(width)
        one[i * actions : (i + 1) * actions] = 1
        add(one, 1, 1)
    for table, bound in (
        (tables.nbytes, budget / sum(tables.layers)),
        (tables.error2, error2),
    ):
        if math.isfinite(bound):
            unit = max(_scale(table), 1e-300)
            add(row(table / unit), -np.inf, bound / unit)
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


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(
            "Planning needs scipy: pip install 'lowrank_optax[planner]'."
        ) from error
    return optimize


def _square(error_budget: Any) -> float:
    return math.inf if error_budget is None else float(error_budget) ** 2
