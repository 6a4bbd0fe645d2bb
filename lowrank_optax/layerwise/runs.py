"""``Trial``: an optimizer run on small numbers, to see what an update hangs on.

A step may be traced long before its arrays exist, and they may be large: what is run
here is a tree of the same names whose axes are as short as they can be.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.layerwise.stacks import Stacks, by_path, part_of, with_layers
from lowrank_optax.leaves.layer import Layer

# So many steps may be still, as in an accumulation or at a schedule's start.
_PATIENCE = 64
# Two ways to compute the same differ by less (a branch taken for one layer may be taken
# for all); what is coupled differs by more.
_CLOSE = 1e-4
# Between two compiled programs, in which the sign of a small number may turn.
_ALIKE = 1e-2
# The shortest that long axes are cut to, at first.
_SHORT = 64

# How results are called.
UPDATE, STATE = "The update of params", "The new state at "

Select = Callable[[Any, Any], Any]


class Trial:
    """An optimizer on a small tree with the parts of a model.

    Attributes:
      stacks: of the small tree.
    """

    def __init__(self, tx: Any, tree: Any, stacks: Stacks):
        self.stacks = stacks
        tree, rng = with_layers(tree, stacks.layers), np.random.default_rng(0)
        self.params, self.others, self.grads, other = (
            jax.tree.map(lambda x: _draw(rng, x), tree) for _ in range(4)
        )
        # Gradients of what must not matter: besides other ones, such as any bound on a
        # norm cuts, and such as have no norm, for what guards against them.
        self.kinds = [
            other,
            jax.tree.map(lambda x: x * _huge(x.dtype), other),
            jax.tree.map(lambda x: x * np.asarray(np.nan, x.dtype), other),
        ]
        self.start = jax.jit(quiet_init(tx))
        self.step = jax.jit(lambda *args: tx.update(*args))
        self.alone = jax.jit(lambda layer, *args: tx.update(*args, layer=layer))
        self._steps: list[tuple[Any, Any]] = []

    def plain(self, number: int) -> tuple[Any, Any]:
        """Returns updates and state of a step in which nothing is other than it was.

        They are kept: both comparisons are with the same ones, and a first step may be
        long, as that in which bases are found.
        """
        while len(self._steps) <= number:
            state = self._steps[-1][1] if self._steps else self.start(self.params)
            self._steps.append(self.step(self.grads, state, self.params))
        return self._steps[number]

    def affected(self, source: Select, rest: Select) -> str | None:
        """Returns the first result to change with what it must not hang on.

        Args:
          source: ``source(path, leaf)``, an index to the entries of a parameter and its
            gradient that are made others, or None.
          rest: ``rest(name, leaf)``, the same for the results that must stay, updates
            and new state.
        """
        params = _mixed(self.params, self.others, source)
        state, number = self.start(params), itertools.count()
        for others in self.kinds:
            grads = _mixed(self.grads, others, source)
            for _ in range(_PATIENCE):
                updates, state = self.step(grads, state, params)
                found = _results(updates, state, rest)
                expected = _results(*self.plain(next(number)), rest)
                for name, x in expected.items():
                    if not _equal(x, found[name], _CLOSE):
                        return name
                if _moved(expected):
                    break
            else:
                return None  # nothing moves it
        return None

    def unlike_alone(self) -> str | None:
        """Returns the first update to be another one when layers come one by one."""
        state = self.start(self.params)
        for number in range(_PATIENCE):
            updates, state = self._one_by_one(state)
            found, expected = _results(updates), _results(self.plain(number)[0])
            for name, x in expected.items():
                if not _equal(x, found[name], _ALIKE):
                    return name
            if _moved(expected):
                break
        return None

    def _one_by_one(self, state: Any) -> tuple[Any, Any]:
        """Returns updates and state of a step that sees one layer at a time."""
        layers, cut = self.stacks.layers, self.stacks.cut
        before, updates = by_path(state), []
        after = dict(before)
        for i in range(layers):
            grads, params = (
                jax.tree.map(lambda x, i=i: x[i : i + 1], tree)
                for tree in (self.grads, self.params)
            )
            own = self.stacks.state_of(
                {k: x[i : i + 1] if k in cut else x for k, x in before.items()}
            )
            at = Layer(jnp.int32(i), layers)
            one, new = self.alone(at, grads, own, params)
            updates.append(one)
            for path, x in by_path(new).items():
                after[path] = after[path].at[i].set(x[0]) if path in cut else x
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *updates)
        return joined, jax.tree.unflatten(jax.tree.structure(state), after.values())


def trials(tx: Any, tree: Any, whole: Stacks) -> Iterator[Trial]:
    """Yields trees to try, the smallest first.

    They have two layers, and axes no longer than needed for the optimizer to keep the
    same state of them, array by array: a rank may ask for more than the shortest ones,
    and a rule that leaves small matrices alone. 16-bit leaves are float32, unless their
    dtype decides what is kept of them. The last tree has the own shapes and dtypes.

    Args:
      tx: the optimizer.
      tree: the parameters' shapes.
      whole: the stacks of ``tree``, with its layers.
    """
    kinds, layers = _kinds(whole), whole.layers
    longest = max((max(x.shape, default=1) for x in jax.tree.leaves(tree)), default=1)
    caps = itertools.takewhile(lambda n: n < longest, (_SHORT << k for k in range(40)))
    sizes = [*((2, cap) for cap in caps), (2, longest), (layers, longest)]
    for (count, cap), wide in itertools.product(sizes, (True, False)):
        small = jax.tree_util.tree_map_with_path(
            lambda path, x, cap=cap, wide=wide: _capped(path, x, cap, wide), tree
        )
        try:
            stacks = Stacks(quiet_init(tx), small, count)
        except (TypeError, ValueError):
            continue
        if _kinds(stacks) == kinds:
            yield Trial(tx, small, stacks)


def apart(function: Callable[[], Any]) -> Any:
    """Calls a function that computes, in the middle of a trace.

    In a thread of its own: it has no trace under way and no mesh. (What
    ``jax.ensure_compile_time_eval`` has computed at once includes the constants of
    functions that are traced inside, which not all of JAX's operations bear.)
    """

    def call() -> Any:
        with (
            jax.sharding.use_abstract_mesh(AbstractMesh((), ())),
            jax.debug_nans(False),
            jax.debug_infs(False),
        ):
            return function()

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result()


def _kinds(stacks: Stacks) -> dict[str, tuple[Any, ...]]:
    return {
        path: (jnp.issubdtype(x.dtype, jnp.floating), x.ndim, path in stacks.cut)
        for path, x in stacks.whole.items()
    }


def _capped(path: Any, x: Any, cap: int, wide: bool) -> Any:
    shape = tuple(min(size, cap) for size in x.shape)
    if part_of(path) == "layers":
        shape = (x.shape[0], *shape[1:])
    # Products of 16-bit numbers are slow on a host.
    half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jax.ShapeDtypeStruct(shape, jnp.float32 if half and wide else x.dtype)


def _draw(rng: Any, x: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return np.zeros(x.shape, x.dtype)
    return rng.standard_normal(x.shape).astype(x.dtype)


def _huge(dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.floating):
        return np.ones((), dtype)
    # Finite, as are sums of such numbers; their squares are not.
    return np.asarray(float(jnp.finfo(dtype).max) ** 0.8, dtype)


def _mixed(tree: Any, others: Any, source: Select) -> Any:
    """Returns the tree with some entries taken from another one."""

    def mix(path: Any, x: Any, other: Any) -> Any:
        index = source(path, x)
        if index is None:
            return x
        x = np.array(x)
        x[index] = other[index]
        return x

    return jax.tree_util.tree_map_with_path(mix, tree, others)


def _results(updates: Any, state: Any = (), rest: Select | None = None) -> Any:
    """Returns by name what is real and floating, or some entries of it."""
    named = {f"{UPDATE}{path}": x for path, x in by_path(updates).items()}
    named |= {f"{STATE}{path}": x for path, x in by_path(state).items()}
    found = {}
    for name, x in named.items():
        index = ... if rest is None else rest(name, x)
        if index is not None and jnp.issubdtype(x.dtype, jnp.floating):
            # In double precision the norm of float32's largest numbers is finite.
            found[name] = np.asarray(x, np.float64)[index]
    return found


def _equal(a: Any, b: Any, least: float) -> bool:
    good = np.isfinite(a)
    if (good != np.isfinite(b)).any():
        return False
    a, b = a[good], b[good]
    return bool(np.linalg.norm(a - b) <= least * np.linalg.norm(a))


def _moved(found: dict[str, Any]) -> bool:
    return any(np.any(x) for name, x in found.items() if name.startswith(UPDATE))
