"""``Coupling``: finds updates that hang on other parts of a model, or other layers.

Nothing here knows what an optimizer is made of. What a part's results need of the
inputs, JAX says itself, which throws away what is not needed for them; what a layer's
results need of a stack is seen when the other layers change.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from lowrank_optax.layerwise.runs import STATE, UPDATE, Trial, apart, trials
from lowrank_optax.layerwise.stacks import Stacks, by_path, part_of, with_layers


class Coupling:
    """Whether an optimizer updates every part, and every layer, from itself alone.

    Attributes:
      tx: the optimizer; it takes extra arguments.
      params: the parameters' shapes.
      masked: the same with all but the layers masked.
      state: its state of ``params``.
      stacks: the layers' state.
    """

    def __init__(
        self,
        tx: Any,
        params: Any,
        masked: Any,
        state: Any,
        stacks: Stacks,
        owner: dict[str, str],
    ):
        """Names the inputs of an update, its results, and whose they are.

        ``owner`` has the part that a leaf of the state belongs to, by path, but for
        those that serve several.
        """
        self.tx, self.stacks, self.state = tx, stacks, state
        self.params, self.masked = (
            with_layers(tree, stacks.layers) for tree in (params, masked)
        )
        ours = [_owner(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        kept = [owner.get(path) for path in by_path(state)]
        # Of the state only numbers count: flags and counters say when, not what.
        given = [
            part if jnp.issubdtype(leaf.dtype, jnp.floating) else None
            for part, leaf in zip(kept, jax.tree.leaves(state), strict=True)
        ]
        self._inputs = [*ours, *given, *ours]
        names = [f"{UPDATE}{path}" for path in by_path(params)]
        names += [f"{STATE}{path}" for path in by_path(state)]
        self._results = dict(zip(names, [*ours, *kept], strict=True))

    def refuse(self) -> None:
        """Raises ValueError, with the first result that hangs on something else."""
        self._refuse_parts()
        if self.stacks.layers > 1 and jax.tree.leaves(self.masked):
            self._refuse_layers()

    # Part from part.

    def _refuse_parts(self) -> None:
        """Raises if JAX needs of other parts for a part's results."""
        closed = jax.make_jaxpr(lambda *args: self.tx.update(*args))(
            self.params, self.state, self.params
        )
        # A class of its own closes over the constants up to some version of JAX.
        jaxpr = _barriers_split(getattr(closed, "jaxpr", closed))

        def others(part: str | None, used: list[bool]) -> list[str]:
            _, needed = dce_jaxpr(jaxpr, used)
            pairs = zip(self._inputs, needed, strict=True)
            found = {source for source, need in pairs if need}
            return sorted(x for x in found if x not in (None, part))

        # All results of a part at once; only for a message is each asked by itself.
        parts = list(self._results.values())
        for part in dict.fromkeys(parts):
            if not others(part, [other == part for other in parts]):
                continue
            for name, own in self._results.items():
                sources = others(part, [other == name for other in self._results])
                if own == part and sources:
                    source = f"the gradient of {', '.join(sources)}"
                    raise ValueError(_COUPLED.format(name=name, source=source))

    # Layer from layer.

    def _refuse_layers(self) -> None:
        """Raises if a layer's results change with the layers before it."""

        def changed(trial: Trial) -> tuple[str | None, str]:
            cut = {f"{STATE}{path}" for path in trial.stacks.cut}

            def rest(name: str, x: Any) -> Any:
                own = name.startswith(UPDATE) or name in cut
                return slice(1, None) if own else None

            name = trial.affected(lambda path, x: 0, rest)
            return (trial.unlike_alone(), _DRAW) if name is None else (name, _SEVERAL)

        def first() -> tuple[str | None, str]:
            error: Exception = ValueError(_UNTRIED)
            for trial in trials(self.tx, self.masked, self.stacks):
                try:
                    return changed(trial)
                except (TypeError, ValueError) as problem:
                    error = problem  # of an array inside that fits other shapes alone
            raise error

        name, source = apart(first)
        if name is not None:
            raise ValueError(_COUPLED.format(name=name, source=source))


def _barriers_split(jaxpr: Any) -> Any:
    """Gives every operand of an optimization barrier one of its own.

    A barrier hands on what it is given, each as it was, and mixes nothing; JAX has no
    rule that says so, and would need all of it for one result.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    if inner is not jaxpr:
        return jaxpr.replace(jaxpr=_barriers_split(inner))

    def inside(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(inside, value))
        return _barriers_split(value) if hasattr(value, "eqns") else value

    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier":
            pairs = zip(eqn.invars, eqn.outvars, strict=True)
            eqns += [eqn.replace(invars=[a], outvars=[b]) for a, b in pairs]
        else:
            params = {name: inside(value) for name, value in eqn.params.items()}
            eqns.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=eqns)


def _owner(path: Any) -> str:
    part = part_of(path)
    return part if part in ("embed", "layers") else "head"


_UNTRIED = (
    "Whether tx keeps layers apart cannot be tried: with arrays of these shapes its "
    "init makes another state than with their shapes alone."
)
_SEVERAL = "several layers at once"
_DRAW = "one draw of random numbers for all layers, or on a layer's place among them"
_COUPLED = (
    "{name} depends on {source}: tx couples leaves or layers (clipping by the global "
    "norm or by that of a leaf, a guard against non-finite values, trust ratios), and "
    "a layer-wise step never holds all gradients at once. Use clip_norm= and "
    "skip_nonfinite= of train_step, not of tx."
)
