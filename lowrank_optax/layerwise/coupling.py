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
from lowrank_optax.layerwise.stacks import by_path, part_of, with_layers


class Coupling:
    """Whether an optimizer updates every part, and every layer, from itself alone.

    Attributes:
      tx: the optimizer; it takes extra arguments.
      params: parameters, arrays or ShapeDtypeStructs.
      masked: the same with all but the layers masked.
      state: its state of ``params``.
      layers: how many layers the stacks have.
      owner: which part a leaf of the state belongs to, by path; those that serve
        several are not there.
    """

    def __init__(self, tx, params, masked, state, layers: int, owner: dict[str, str]):
        self.tx, self.layers = tx, layers
        self.params, self.masked = (with_layers(x, layers) for x in (params, masked))
        self.state = state
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
        if self.layers > 1 and jax.tree.leaves(self.masked):
            apart(self._refuse_layers)

    # Part from part.

    def _refuse_parts(self) -> None:
        """Raises if JAX needs other parts for a part's results, and they tell."""
        closed = jax.make_jaxpr(lambda *args: self.tx.update(*args))(
            self.params, self.state, self.params
        )
        # A class of its own closes over the constants up to some version of JAX.
        jaxpr: Any = getattr(closed, "jaxpr", closed)

        def sources(part: str | None, used: list[bool]) -> list[str]:
            _, needed = dce_jaxpr(jaxpr, used)
            found = {
                other
                for other, need in zip(self._inputs, needed, strict=True)
                if need and other not in (None, part)
            }
            return sorted(found)

        parts = list(self._results.values())
        suspects = {
            part: others
            for part in dict.fromkeys(parts)
            if (others := sources(part, [other == part for other in parts]))
        }
        if suspects and (name := apart(lambda: self._first_mixed(suspects))):
            part, alone = (
                self._results[name],
                [other == name for other in self._results],
            )
            source = f"the gradient of {', '.join(sources(part, alone))}"
            raise ValueError(_COUPLED.format(name=name, source=source))

    def _first_mixed(self, suspects: dict[str | None, list[str]]) -> str | None:
        """Returns the first result to change with what its program holds of others.

        A barrier hands on all that it is given, each as it was, and so may a loop or
        an operation of which JAX does not say what belongs to what.
        """

        def affected(trial: Trial, part: str | None) -> str | None:
            return trial.affected(
                lambda path, x: ... if _owner(path) in suspects[part] else None,
                lambda name, x: ... if self._results[name] == part else None,
            )

        for trial in trials(self.tx, self.params, self.layers):
            try:
                found = (affected(trial, part) for part in suspects)
                return next((name for name in found if name is not None), None)
            except (TypeError, ValueError):
                continue
        # Nothing can be tried: what JAX says stands.
        part = next(iter(suspects))
        return next(name for name, other in self._results.items() if other == part)

    # Layer from layer.

    def _refuse_layers(self) -> None:
        """Raises if a layer's results change with the layers before it."""
        error: Exception | None = None
        for trial in trials(self.tx, self.masked, self.layers):
            cut = {f"{STATE}{path}" for path in trial.stacks.cut}

            def rest(name: str, x: Any, cut: set[str] = cut) -> Any:
                return (
                    slice(1, None) if name.startswith(UPDATE) or name in cut else None
                )

            try:
                name, source = trial.affected(lambda path, x: 0, rest), _SEVERAL
                if name is None:
                    name, source = trial.unlike_alone(), _DRAW
            except (TypeError, ValueError) as problem:
                error = problem  # an array inside that fits the real shapes alone
                continue
            if name is not None:
                raise ValueError(_COUPLED.format(name=name, source=source))
            return
        if error is not None:
            raise error


def _owner(path: Any) -> str:
    part = part_of(path)
    return part if part in ("embed", "layers") else "head"


_SEVERAL = "several layers at once"
_DRAW = "one draw of random numbers for all layers, or on a layer's place among them"
_COUPLED = (
    "{name} depends on {source}: tx couples leaves or layers (clipping by the global "
    "norm or by that of a leaf, a guard against non-finite values, trust ratios), and "
    "a layer-wise step never holds all gradients at once. Use clip_norm= and "
    "skip_nonfinite= of train_step, not of tx."
)
