"""``AdaptivePlanner``: a training step whose plan is measured again and replaced."""

import collections
import concurrent.futures
import math
from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax import _checks
from lowrank_optax.activations.checkpoint.actions import parse_actions
from lowrank_optax.activations.checkpoint.policy import Policy
from lowrank_optax.activations.planner import probes
from lowrank_optax.activations.planner.audit import audit
from lowrank_optax.activations.planner.choose import ACTIONS, plan_activations
from lowrank_optax.activations.planner.plan import ActivationPlan

Key = tuple[tuple[int, Policy], ...]


class AdaptivePlanner:
    r"""A training step whose activations follow a plan that is kept up to date.

    Call it in the step's place. The first call plans and compiles. Every ``every``
    steps the gradient errors of all actions are measured again on present data, and the
    plan is made anew with them. It replaces the present one, with ``e`` the present
    plan's error by the new measurements and ``t`` predicted times, if::

        e > error_budget     or     t_new < (1 - gain) t_present

    The step under a new plan is compiled in another thread, while training goes on
    under the old one, and takes over between two steps. Parameters, optimizer state and
    data are not touched: a policy changes nothing but the gradients' rounding.

    Memory is measured, too: with ``memory_bytes`` a plan whose compiled step takes more
    than that is made anew with as many bytes less.

    Args:
      build: plan -> ``jax.jit`` of the step under it, for example with
        ``scan_layers(block, plan, ...)`` inside. Arguments and results must not depend
        on the plan.
      sample: the step's arguments -> the arguments of ``block`` for one layer: real
        parameters and activations.
      block: as in ``plan_activations``.
      n_layers: likewise.
      every: steps from one measurement to the next.
      gain: the least part of the predicted time that a new plan must save.
      executables: compiled steps that are kept; the one used longest ago goes first.
      swap_after: steps from the decision for a plan to the first one under it, for
        which the compiler is waited for if need be: a run can be repeated. None takes
        it over as soon as it is compiled.
      memory_bytes: the most that the step may take per device, arguments, results and
        temporaries together (see ``audit``); None: any.
      errors: the step's arguments -> errors, as from ``probe_errors``, in place of the
        measurement at ``sample``.
      record: the result of ``record()`` in a run that goes on here.
      log: called with a dictionary for every decision, for the run's metrics: step,
        the decision, policies, predictions, the present plan's measured error, and
        the device's peak of memory where it counts that.
      **options: further arguments of ``plan_activations``: a budget, ...

    Raises:
      TypeError: if a count is no Python int.
      ValueError: if a number is out of range; and as ``plan_activations``, at the first
        call, or if no plan keeps ``memory_bytes``. Later plans that cannot be made are
        logged, and the present one stays.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     return jnp.tanh(checkpoint_name(x @ w, "hidden"))
      >>> def build(plan):
      ...     def loss(w, x):
      ...         return activations.scan_layers(layer, plan, w, x).sum()
      ...     return jax.jit(lambda w, x: w - 1e-3 * jax.grad(loss)(w, x))
      >>> step = activations.AdaptivePlanner(
      ...     build, lambda w, x: (w[0], x), layer, 4, every=100, budget_fraction=0.5
      ... )
      >>> step(jnp.stack([jnp.eye(64)] * 4), jnp.ones((8, 64))).shape
      (4, 64, 64)

    References:
      Chen et al., Adacc: An Adaptive Framework Unifying Compression and Activation
      Recomputation for LLM Training (2025), https://arxiv.org/abs/2508.00806
    """

    def __init__(
        self,
        build: Callable[[ActivationPlan], Any],
        sample: Callable[..., Any],
        block: Callable,
        n_layers: Any,
        *,
        every: Any = 500,
        gain: float = 0.02,
        executables: Any = 4,
        swap_after: Any = None,
        memory_bytes: Any = None,
        errors: Callable[..., Any] | None = None,
        record: Any = None,
        log: Callable[[dict[str, Any]], None] | None = None,
        **options: Any,
    ):
        """Checks the numbers; nothing is planned before the first call."""
        self._build, self._sample, self._block = build, sample, block
        self._layers = n_layers
        self._every = _checks.positive_int("every", every)
        self._most = _checks.positive_int("executables", executables)
        if not 0 <= gain < 1:
            raise ValueError(
                f"`gain` must be in [0, 1), a part of the time; got {gain}."
            )
        if swap_after is not None:
            _checks.positive_int("swap_after", swap_after)
        self._swap_after, self._limit = swap_after, memory_bytes
        self._gain, self._log, self._options = gain, log or (lambda _: None), options
        self._actions = parse_actions(options.get("actions", ACTIONS))
        self._errors = errors or self._probed
        self._compiled: collections.OrderedDict[Key, Any] = collections.OrderedDict()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "activation-plan")
        self._next: tuple[ActivationPlan, concurrent.futures.Future] | None = None
        self._due = 0
        self._past = record
        self.plan: Any = None
        self.steps = 0

    def __call__(self, *args: Any) -> Any:
        """Runs one step under the present plan."""
        if self.plan is None:
            self._begin(args)
        elif self._next is not None and self._may_swap():
            self._swap()
        elif self._next is None and self.steps % self._every == 0:
            self._reconsider(args)
        self.steps += 1
        present: Any = self.plan
        return self._compiled[_key(present)](*args)

    def wait(self) -> None:
        """Waits for the compilation under way, and takes its plan over."""
        if self._next is not None:
            concurrent.futures.wait([self._next[1]])
            self._swap()

    def record(self) -> dict[str, Any]:
        """Returns the present plan, and one that is under way, as JSON can hold them.

        A planner that is given this goes on as this one would, if the plans under way
        have a ``swap_after``.
        """
        coming = None if self._next is None else self._next[0].to_json()
        return {
            "steps": self.steps,
            "plan": self.plan and self.plan.to_json(),
            "next": coming,
            "due": self._due,
        }

    def _begin(self, args: Any) -> None:
        """The first call: plans and compiles, or goes on from a record."""
        past, self._past = self._past, None
        if past is None or past["plan"] is None:
            errors = self._errors(*args)
            plan = self._planned(args, errors)
            self.plan, program = self._fitted(plan, args, errors)
            self._keep(self.plan, program)
            self._say("planned", self.plan)
            return
        self.steps, self._due = past["steps"], past["due"]
        # From the record, not planned again: measurements would differ by now.
        self.plan = ActivationPlan.from_json(past["plan"])
        self._keep(self.plan, self._compile(self.plan, _shapes(args)))
        self._say("resumed", self.plan)
        if past["next"] is not None:
            coming = ActivationPlan.from_json(past["next"])
            self._next = coming, self._submit(coming, args, None)

    def _may_swap(self) -> bool:
        if self._swap_after is None:
            return self._next is not None and self._next[1].done()
        return self.steps >= self._due

    def _probed(self, *args: Any) -> Any:
        return probes.probe_errors(
            self._block, self._sample(*args), self._actions, n_layers=self._layers
        )

    def _planned(self, args: Any, errors: Any, **options: Any) -> ActivationPlan:
        layer = jax.eval_shape(self._sample, *args)
        options = self._options | options
        return plan_activations(
            self._block, layer, self._layers, errors=errors, **options
        )

    def _reconsider(self, args: Any) -> None:
        """Measures, plans, and starts to compile if that is worth it."""
        errors = self._errors(*args)
        # The present plan's error by the new measurements.
        squares = sum(
            s.layers * sum(errors[c.tag, c.action] ** 2 for c in s.choices)
            for s in self.plan.segments
        )
        error = math.sqrt(squares / self.plan.n_layers)
        try:
            new = self._planned(args, errors)
        except ValueError as problem:
            self._say("kept", self.plan, error=error, problem=str(problem))
            return
        bound = self._options.get("error_budget") or math.inf
        saved = self.plan.predicted.time_ms - new.predicted.time_ms
        worth = saved > self._gain * self.plan.predicted.time_ms
        if _key(new) == _key(self.plan) or not (error > bound or worth):
            self._say("kept", self.plan, error=error)
            return
        self._say("compiling", new, error=error)
        self._due = self.steps + (self._swap_after or 0)
        self._next = new, self._submit(new, args, errors)

    def _submit(self, plan: ActivationPlan, args: Any, errors: Any) -> Any:
        """Starts to compile in the other thread, which must not hold arrays."""
        # Shapes, since a step may donate its arguments before the compiler reads them.
        ready, shapes = self._compiled.get(_key(plan)), _shapes(args)
        if ready is not None:
            return self._worker.submit(lambda: (plan, ready))
        return self._worker.submit(lambda: self._fitted(plan, shapes, errors))

    def _fitted(self, plan: ActivationPlan, args: Any, errors: Any) -> Any:
        """Returns a compiled step that keeps ``memory_bytes``, and its plan."""
        while True:
            program = self._compile(plan, _shapes(args))
            if self._limit is None or errors is None:
                return plan, program
            more = audit(program).total_bytes - self._limit
            if more <= 0:
                return plan, program
            planned, least = plan.predicted.total_bytes, plan.full_recompute.total_bytes
            if planned <= least:
                raise ValueError(
                    f"The compiled step takes {more:,} bytes more than memory_bytes="
                    f"{self._limit:,}, though every tagged value is computed again. "
                    "Use a smaller batch, or more devices."
                )
            budget = {
                "budget_fraction": None,
                "budget_bytes": max(planned - more, least),
            }
            plan = self._planned(args, errors, **budget)

    def _compile(self, plan: ActivationPlan, shapes: Any) -> Any:
        return self._build(plan).lower(*shapes).compile()

    def _swap(self) -> None:
        (plan, future), self._next = self._next, None  # pyright: ignore[reportGeneralTypeIssues]
        try:
            plan, program = future.result()
        # The present plan's program is there still, so that training can go on.
        except Exception as problem:
            self._say("failed", plan, problem=str(problem))
            return
        self.plan = plan
        self._keep(plan, program)
        self._say("swapped", plan)

    def _keep(self, plan: ActivationPlan, program: Any) -> None:
        self._compiled[_key(plan)] = program
        self._compiled.move_to_end(_key(plan))
        while len(self._compiled) > self._most:
            self._compiled.popitem(last=False)

    def _say(self, what: str, plan: ActivationPlan, **more: Any) -> None:
        found, program = plan.predicted, self._compiled.get(_key(plan))
        compiled = None if program is None else audit(program).total_bytes
        stats = jax.devices()[0].memory_stats() or {}  # a CPU keeps none
        self._log(
            {
                "step": self.steps,
                "activation_plan": what,
                "policies": [[s.layers, str(s.policy)] for s in plan.segments],
                "predicted_bytes": found.total_bytes,
                "predicted_ms": found.time_ms,
                "predicted_error": found.error,
                "compiled_bytes": compiled,
                "peak_bytes": stats.get("peak_bytes_in_use"),
                **more,
            }
        )


def _key(plan: ActivationPlan) -> Key:
    """Returns the part of a plan that fixes its step: predictions do not."""
    return tuple((segment.layers, segment.policy) for segment in plan.segments)


def _shapes(args: Any) -> Any:
    """Returns the arguments with the shapes of arrays, and where they lie."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        weak = getattr(leaf, "weak_type", False)  # keys have none
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=weak
        )

    return jax.tree.map(shape, args)
