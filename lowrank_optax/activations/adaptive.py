"""Plans that follow the training: probed again, compiled aside, then swapped in."""

import collections
import concurrent.futures
import math
from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax import _checks
from lowrank_optax.activations import probe
from lowrank_optax.activations._requests import parse
from lowrank_optax.activations.plan import ActivationPlan
from lowrank_optax.activations.planner import ACTIONS, plan_activations

Key = tuple[tuple[int, Any], ...]


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
      log: called with a dictionary for every decision, for the run's metrics: step,
        what was decided, policies, predictions, the present plan's measured error, and
        the device's peak of memory where it counts that.
      **options: further arguments of ``plan_activations``: a budget, ...

    Raises:
      TypeError: if a count is no Python int.
      ValueError: if a number is out of range; and as ``plan_activations``, at the first
        call. Later plans that cannot be made are logged, and the present one stays.

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
        self._gain, self._log, self._options = gain, log or (lambda _: None), options
        self._actions = parse(options.get("actions", ACTIONS))
        self._compiled: collections.OrderedDict[Key, Any] = collections.OrderedDict()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "activation-plan")
        self._next: tuple[ActivationPlan, concurrent.futures.Future] | None = None
        self.plan: Any = None
        self.steps = 0

    def __call__(self, *args: Any) -> Any:
        """Runs one step under the present plan."""
        if self.plan is None:
            self.plan = self._planned(args)
            self._keep(self.plan, self._compile(self.plan, _shapes(args)))
            self._say("planned", self.plan)
        elif self._next is not None and self._next[1].done():
            self._swap()
        elif self._next is None and self.steps % self._every == 0:
            self._reconsider(args)
        self.steps += 1
        return self._compiled[_key(self.plan)](*args)

    def wait(self) -> None:
        """Waits for the compilation under way, and takes its plan over."""
        if self._next is not None:
            concurrent.futures.wait([self._next[1]])
            self._swap()

    def _planned(self, args: Any, errors: Any = None) -> ActivationPlan:
        layer = self._sample(*args)
        return plan_activations(
            self._block, layer, self._layers, errors=errors, **self._options
        )

    def _reconsider(self, args: Any) -> None:
        """Measures, plans, and starts to compile if that is worth it."""
        errors = probe.probe_errors(self._block, self._sample(*args), self._actions)
        error = _error(self.plan, errors)
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
        ready = self._compiled.get(_key(new))
        shapes = _shapes(args)
        task = (lambda: ready) if ready else (lambda: self._compile(new, shapes))
        self._next = new, self._worker.submit(task)

    def _compile(self, plan: ActivationPlan, shapes: Any) -> Any:
        return self._build(plan).lower(*shapes).compile()

    def _swap(self) -> None:
        (plan, future), self._next = self._next, None  # pyright: ignore[reportGeneralTypeIssues]
        try:
            program = future.result()
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
        found = plan.predicted
        self._log(
            {
                "step": self.steps,
                "activation_plan": what,
                "policies": [[s.layers, str(s.policy)] for s in plan.segments],
                "predicted_bytes": found.total_bytes,
                "predicted_ms": found.time_ms,
                "predicted_error": found.error,
                "peak_bytes": _peak_bytes(),
                **more,
            }
        )


def _peak_bytes() -> int | None:
    """Returns the most memory in use so far, where the device counts it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _key(plan: ActivationPlan) -> Key:
    return tuple((segment.layers, segment.policy) for segment in plan.segments)


def _error(plan: ActivationPlan, errors: Any) -> float:
    """Returns a plan's error by other measurements than those it was made with."""
    squares = sum(
        segment.layers * sum(errors[c.tag, c.action] ** 2 for c in segment.choices)
        for segment in plan.segments
    )
    return math.sqrt(squares / plan.n_layers)


def _shapes(args: Any) -> Any:
    """Returns the shapes of the arguments, and where arrays are."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type
        )

    return jax.tree.map(shape, args)
