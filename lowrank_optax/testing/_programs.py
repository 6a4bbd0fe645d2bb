"""When two traced steps are the same computation: told without compiling either.

Compiling is nearly all that a law of a wrapper would cost, and most wrappers only hand
a step on. So every output of a traced step is written as an expression over the step's
inputs. Where a wrapper starts from the numbers of the plain run and has its
expressions, its run is that run, by induction over the steps; where the expressions
differ nothing has been shown, and the law runs the wrapped step.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _value(x: Any) -> str:
    """A constant: its type and its bits."""
    x = np.asarray(x)
    return _hash("value", str(x.dtype), str(x.shape), x.tobytes().hex())


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def _parameter(x: Any) -> str:
    """An equation's parameter.

    What prints as an address differs from one trace to the next, and is then taken for
    a difference, which is safe.
    """
    if _is_jaxpr(x):
        return _program(x)
    if isinstance(x, jax.sharding.Sharding | jax.sharding.PartitionSpec):
        return repr(None)  # where a number lies does not change it
    if isinstance(x, tuple | list):
        return _hash("tuple", *map(_parameter, x))
    return _value(x) if isinstance(x, np.ndarray | jax.Array) else repr(x)


@functools.lru_cache(maxsize=1000)  # equal leaves share theirs
def _program(jaxpr: Any) -> str:
    invars = getattr(jaxpr, "jaxpr", jaxpr).invars
    names = [f"{i} {v.aval}" for i, v in enumerate(invars)]
    return _hash("jaxpr", *expressions(jaxpr, names))


def expressions(
    jaxpr: Any, names: Sequence[str], inline: Sequence[str] = ("jit", "pjit")
) -> list[str]:
    """Writes each output of a jaxpr as a hash of the expression that computes it.

    The order of equations, names of variables, what is computed in vain, and calls of
    ``jit`` do not show.

    Args:
      jaxpr: a closed jaxpr, or an open one without constants.
      names: what to call the inputs.
      inline: primitives to read as one call of what they hold. Only those of ``jaxpr``
        itself: inside, calls of ``jit`` alone.

    Returns:
      One hash per output.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    constants = map(_value, getattr(jaxpr, "consts", ()))
    known = dict(zip(inner.constvars, constants, strict=True))
    known |= dict(zip(inner.invars, names, strict=True))

    def read(atom):
        return f"{atom.val!r} {atom.aval}" if hasattr(atom, "val") else known[atom]

    for equation in inner.eqns:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name in inline:
            results = expressions(equation.params["jaxpr"], operands)
        else:
            parameters = (f"{k}={_parameter(v)}" for k, v in equation.params.items())
            whole = _hash(equation.primitive.name, *sorted(parameters), *operands)
            results = [f"{whole} {i}" for i in range(len(equation.outvars))]
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in inner.outvars]


def called_in(jaxpr: Any, name: str, arguments: Sequence[str]) -> list[str] | None:
    """Writes what a function under ``jit`` computes that is called inside a jaxpr.

    Args:
      jaxpr: where to look, in what its equations hold too.
      name: the function's.
      arguments: what to call the function's arguments.

    Returns:
      One expression per output, None where there is no such call, or one with other
      arguments.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        bodies = list(filter(_is_jaxpr, equation.params.values()))
        if equation.params.get("name") == name:
            same = len(equation.invars) == len(arguments)
            return expressions(bodies[0], arguments) if same else None
        for body in bodies:
            if (found := called_in(body, name, arguments)) is not None:
                return found
    return None


def whole_step(tx: optax.GradientTransformation) -> Callable:
    """Returns (params, state, gradient) -> (params, state, updates)."""

    def whole_step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    return whole_step


Names = Callable[[Any, Any], list[int | None]]


def by_path(plain: Any, tree: Any) -> list[int | None]:
    """Which plain leaf each leaf of a wrapped tree is: the one whose path ends its own.

    A wrapper puts its own path before that of what it wraps; where several would do,
    it is the one that stands before most leaves. A wrong guess is seen: the numbers or
    the expressions differ.
    """

    def paths(tree):
        found = jax.tree_util.tree_leaves_with_path(tree)
        return [tuple(map(str, path)) for path, _ in found]

    place = {path: i for i, path in enumerate(paths(plain))}
    splits = [
        {path[:k]: place[path[k:]] for k in range(len(path) + 1) if path[k:] in place}
        for path in paths(tree)
    ]
    common = collections.Counter(prefix for split in splits for prefix in split)
    return [
        split[max(split, key=common.__getitem__)] if split else None for split in splits
    ]


def by_place(plain: Any, tree: Any) -> list[int | None]:
    """As ``by_path``, for another container of the same leaves in the same order."""
    same = len(jax.tree.leaves(plain)) == len(jax.tree.leaves(tree))
    return list(range(len(jax.tree.leaves(tree)))) if same else by_path(plain, tree)


KINDS = ("params", "state", "gradient")


def plain_names(arguments: Sequence[Any]) -> list[str]:
    """What the leaves of (params, state, gradient) of the plain step are called."""
    trees = [jax.tree.leaves(tree) for tree in arguments]
    return [
        f"{kind} {i} {jax.typeof(leaf)}"
        for kind, leaves in zip(KINDS, trees, strict=True)
        for i, leaf in enumerate(leaves)
    ]


class Step:
    """A wrapped step beside the plain one.

    Attributes:
      out: shapes of (params, state, updates).
      runs_as_plain: whether the runs are shown to be the same, but for leaves that the
        plain run does not have.
      passed: per leaf of the updates, whether it is the gradient as it came.
    """

    def __init__(
        self,
        plain: tuple[Sequence[Any], list[str]],
        tx: optax.GradientTransformation,
        arguments: Sequence[Any],
        match: Names = by_path,
        ignore: Sequence[int] = (),
    ):
        """Traces the step.

        Args:
          plain: the plain step's arguments, and the expressions of its outputs.
          tx: the wrapped transformation.
          arguments: its (params, state, gradient).
          match: says which leaves are which.
          ignore: leaves of the parameters that the wrapper takes away.
        """
        theirs, written = plain
        matched = [match(p, a) for p, a in zip(theirs, arguments, strict=True)]
        for of_leaves in (matched[0], matched[2]):
            of_leaves[:] = [None if i in ignore else i for i in of_leaves]
        sizes = [len(jax.tree.leaves(tree)) for tree in theirs]
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        names, expected = plain_names(theirs), written
        # A leaf that the plain run lacks gets a name that no plain expression contains.
        own = [
            [
                f"own {kind} {k}" if i is None else names[start + i]
                for k, i in enumerate(found)
            ]
            for kind, start, found in zip(KINDS, starts, matched, strict=True)
        ]
        jaxpr, self.out = jax.make_jaxpr(whole_step(tx), return_shape=True)(*arguments)
        results = expressions(jaxpr, [name for group in own for name in group])
        count = [len(found) for found in matched]
        self.passed = [
            a == b for a, b in zip(results[-count[2] :], own[2], strict=True)
        ]
        # Leaves of the wrapper's own may become anything.
        wanted = [
            None if i is None else expected[start + i]
            for start, found in zip(starts, matched, strict=True)
            for i in found
        ]
        # Every parameter that the wrapper does not take away must have been recognized.
        kept = set(range(sizes[0])) - set(ignore)
        self.runs_as_plain = (
            kept <= set(matched[0])
            and self._starts_alike(theirs, arguments, matched)
            and all(w in (None, r) for w, r in zip(wanted, results, strict=True))
        )

    @staticmethod
    def _starts_alike(theirs, arguments, matched) -> bool:
        """Whether the leaves that both have hold the same bits at the start."""
        for plain, tree, found in zip(theirs, arguments, matched, strict=True):
            leaves = jax.tree.leaves(plain)
            for i, leaf in zip(found, jax.tree.leaves(tree), strict=True):
                if i is not None and _value(leaf) != _value(leaves[i]):
                    return False
        return True
