"""What every Optax transformation owes its users: one law, one function."""

import functools
import inspect
import warnings
from collections.abc import Callable, Collection
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.bracket.notice import quiet_init
from lowrank_optax.methods import static_args
from lowrank_optax.testing._assertions import assert_bit_equal, assert_state_stable
from lowrank_optax.testing._subject import Subject, gradients_like, step_of

LAWS: dict[str, Callable[[Any], None]] = {}
"""The law suite: name -> check(make), which raises AssertionError on a breach.

``make`` builds the transformation; a ``Subject`` in its place shares the plain run.
"""


def assert_laws(make: Any, skip: Collection[str] = ()) -> None:
    """Asserts every law of ``LAWS`` on one transformation.

    Args:
      make: builds the transformation, or a ``Subject`` with other parameters.
      skip: names of laws to leave out.

    Raises:
      AssertionError: from the first law that does not hold.

    Examples:
      >>> import optax
      >>> from lowrank_optax.testing import LAWS, assert_laws
      >>> slow = set(LAWS) - {"chain", "tree_map_params", "empty_tree"}
      >>> assert_laws(lambda: optax.adam(1e-2), skip=slow)
    """
    subject = make if isinstance(make, Subject) else Subject(make)
    for name, check in LAWS.items():
        if name not in skip:
            check(subject)


def _law(check: Callable[[Subject], None]) -> Callable[[Any], None]:
    @functools.wraps(check)
    def law(make: Any) -> None:
        check(make if isinstance(make, Subject) else Subject(make))

    LAWS[check.__name__.removeprefix("_")] = law
    return law


def _assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Equal but for the order in which another program sums (float32, few steps)."""
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol / 10)


def _run_in_place(
    subject: Subject, tx: Any, rtol: float = 1e-5
) -> tuple[Any, Callable]:
    """Runs ``tx`` in the plain one's place; returns the last state and the step."""
    step = jax.jit(step_of(tx))
    run = subject.trajectory(step, tx.init(subject.params))
    plain = [params for params, _ in subject.run]
    _assert_close([params for params, _ in run], plain, rtol)
    return run[-1][1], step


def _assert_same_run(subject: Subject, tx: Any) -> None:
    """Holds ``tx`` against the plain run, without a run where the programs show it."""
    if not subject.beside(tx).runs_as_plain:
        _run_in_place(subject, tx)


@_law
def _chain(subject: Subject) -> None:
    """``optax.chain`` with neighbours that change nothing changes nothing."""
    _assert_same_run(subject, optax.chain(optax.identity(), subject.make()))


@_law
def _masked(subject: Subject) -> None:
    """``optax.masked``: the masked leaf passes by, the rest is as without it."""
    leaves, treedef = jax.tree.flatten(subject.params)
    last = len(leaves) - 1
    mask = treedef.unflatten([i != last for i in range(len(leaves))])
    tx = optax.masked(subject.make(), mask)
    state = tx.init(subject.params)
    beside = subject.beside(
        tx, (subject.params, state, subject.gradients[0]), without=last
    )
    assert_state_stable(state, beside.out[1])
    if beside.runs_as_plain and beside.passed[last]:
        return
    updates, _ = jax.jit(tx.update)(subject.gradients[0], state, subject.params)
    *seen, masked = jax.tree.leaves(updates)
    assert_bit_equal(masked, jax.tree.leaves(subject.gradients[0])[last])
    moved = jax.tree.leaves(optax.apply_updates(subject.params, updates))[:-1]
    _assert_close(moved, jax.tree.leaves(subject.run[1][0])[:-1])
    assert all(np.isfinite(u).all() for u in seen)


@_law
def _partition(subject: Subject) -> None:
    """``optax.partition``: each group's leaves are as if the others were not there."""
    leaves, treedef = jax.tree.flatten(subject.params)
    labels = treedef.unflatten(["a", *["b"] * (len(leaves) - 1)])
    groups: dict[Any, Any] = {"a": subject.make(), "b": subject.make()}
    tx = optax.partition(groups, labels)
    # A group by itself may have nothing to project.
    quiet: Any = quiet_init(tx)
    _assert_same_run(subject, optax.GradientTransformationExtraArgs(quiet, tx.update))


def _hyperparams(state: Any) -> dict[str, Any]:
    return state.hyperparams


def _with_hyperparams(state: Any, hyperparams: dict[str, Any]) -> Any:
    return state._replace(hyperparams=hyperparams)


@_law
def _inject_hyperparams(subject: Subject) -> None:
    """``optax.inject_hyperparams``: numbers become state, and may be set."""
    signature = inspect.signature(subject.make)
    rate = signature.parameters.get("learning_rate")
    default: Any = getattr(rate, "default", None)
    if default in (None, inspect.Parameter.empty):
        return
    static = static_args(subject.make)

    # Optax hands `*args` and `**kwargs` on as if they were arguments of these names.
    named = [
        p
        for p in signature.parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]

    factory: Any = lambda **options: subject.make(**options)  # noqa: E731
    factory.__signature__ = signature.replace(
        parameters=[p.replace(kind=p.KEYWORD_ONLY) for p in named]
    )
    static = {p.name for p in named} & {*static}
    tx = optax.inject_hyperparams(factory, static_args=static)(learning_rate=default)
    # Before the run: a step may give these buffers away.
    start, gradient = tx.init(subject.params), subject.gradients[0]
    hyperparams = _hyperparams(start)
    # As an array of float32, 0.999 is 6e-8 off, which is 6e-5 of 1 - 0.999.
    last_state, step = _run_in_place(subject, tx, rtol=1e-4)
    last: Any = default(len(subject.gradients) - 1) if callable(default) else default
    rate = _hyperparams(last_state)["learning_rate"]
    np.testing.assert_allclose(rate, last, rtol=1e-6)
    if callable(default):
        return  # a schedule's numbers cannot be set
    # The outermost, should the transformation hold others of that name.
    doubled = _with_hyperparams(start, {**hyperparams, "learning_rate": 2 * rate})
    moved, _ = step(subject.params, doubled, gradient)
    # Mostly it enters the first step linearly; where not, another program tells.
    expected = jax.tree.map(lambda p, q: 2 * q - p, subject.params, subject.run[1][0])
    try:
        _assert_close(moved, expected)
    except AssertionError:
        own = optax.with_extra_args_support(subject.make(learning_rate=2 * default))
        expected, _ = jax.jit(step_of(own))(
            subject.params, own.init(subject.params), gradient
        )
        _assert_close(moved, expected)


@_law
def _multi_steps(subject: Subject) -> None:
    """``optax.MultiSteps`` outside: two equal halves are one whole."""
    tx = optax.MultiSteps(subject.make(), every_k_schedule=2).gradient_transformation()
    step = jax.jit(step_of(tx))
    params, state = subject.params, tx.init(subject.params)
    for (before, _), (after, _), gradient in zip(
        subject.run, subject.run[1:], subject.gradients, strict=False
    ):
        params, state = step(params, state, gradient)
        # The first half moves nothing: the update comes with the second.
        _assert_close(params, before)
        params, state = step(params, state, gradient)
        _assert_close(params, after)


@_law
def _apply_if_finite(subject: Subject) -> None:
    """``optax.apply_if_finite``: a bad step leaves no trace; good ones are as ever."""
    params: Any = subject.params
    step, state = subject.guarded
    for gradient, (expected, _) in zip(subject.gradients, subject.run[1:], strict=True):
        bad = jax.tree.map(lambda g: g * jnp.nan, gradient)
        kept, skipped = step(params, state, bad)
        assert_bit_equal(
            (kept, skipped.inner_state, skipped.notfinite_count),
            (params, state.inner_state, jnp.int32(1)),
        )
        params, state = step(params, skipped, gradient)
        _assert_close(params, expected)


def _only(path: Any) -> Callable[[Any, Any], bool]:
    """A filter for ``optax.tree_utils`` that lets one path through."""
    return lambda other, value: other == path


@_law
def _tree_get_set(subject: Subject) -> None:
    """``optax.tree_utils``: fields are found, and set, by name and by filter."""
    state = subject.run[-1][1]
    found = optax.tree_utils.tree_get_all_with_path(state, "count")
    for path, value in found:
        got = optax.tree_utils.tree_get(state, "count", filtering=_only(path))
        assert got is value
    if found:
        first, value = found[0]
        only = _only(first)
        changed = optax.tree_utils.tree_set(state, only, count=value + 7)
        counts = optax.tree_utils.tree_get_all_with_path(changed, "count")
        for (path, old), (_, new) in zip(found, counts, strict=True):
            assert_bit_equal(new, old + 7 * (path == first))
    for name in ("mu", "nu", "trace", "basis"):
        if len(optax.tree_utils.tree_get_all_with_path(state, name)) != 1:
            continue
        zeros = jax.tree.map(jnp.zeros_like, optax.tree_utils.tree_get(state, name))
        changed = optax.tree_utils.tree_set(state, **{name: zeros})
        assert_bit_equal(optax.tree_utils.tree_get(changed, name), zeros)
        assert_state_stable(state, changed)


@_law
def _tree_map_params(subject: Subject) -> None:
    """``tree_map_params`` maps the moments and leaves the rest alone.

    That is counters, and what is kept for a parameter and is not like it, as ``init``
    says: bases, and moments that are encoded.
    """
    state = subject.run[-1][1]
    tree_map = functools.partial(optax.tree_utils.tree_map_params, subject.tx)
    assert_bit_equal(tree_map(lambda x: x, state), state)
    mapped = tree_map(jnp.zeros_like, state)
    assert_state_stable(state, mapped)
    told = tree_map(lambda x: x, state, transform_non_params=lambda _: None)
    found = optax.tree_utils.tree_get_all_with_path
    for name in ("mu", "nu", "trace"):
        known = [path for path, tree in found(told, name) if tree is not None]
        for path, tree in found(mapped, name):
            if path in known:
                assert not any(np.any(x) for x in jax.tree.leaves(tree)), path
    for (_, old), (_, new) in zip(
        found(state, "count"), found(mapped, "count"), strict=True
    ):
        assert_bit_equal(old, new)


@_law
def _scan(subject: Subject) -> None:
    """A ``lax.scan`` over steps equals a loop."""

    def train(params, state, gradients):
        def body(carry, gradient):
            return step_of(subject.tx)(*carry, gradient), None

        return jax.lax.scan(body, (params, state), gradients)[0]

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *subject.gradients)
    if subject.is_scanned_by(train, (*subject.start[:2], stacked)):
        return
    params, state = jax.jit(train)(*subject.run[0], stacked)
    _assert_close(params, subject.final)
    assert_state_stable(subject.run[-1][1], state)


@_law
def _one_trace(subject: Subject) -> None:
    """``jit`` traces once, whatever the step."""
    traces = []

    def step(params, state, gradient):
        traces.append(None)
        return step_of(subject.tx)(params, state, gradient)

    # Traced and not compiled: what a second trace would need is a new type.
    params, state = subject.run[0]
    trace = jax.jit(step).trace
    for params, state in subject.run[:-1]:
        trace(params, state, subject.gradients[0])
    assert len(traces) == 1, f"traced {len(traces)} times"


@_law
def _no_jit(subject: Subject) -> None:
    """A step without ``jit`` equals one with it."""
    params, state = subject.run[0]
    actual, after = step_of(subject.tx)(params, state, subject.gradients[0])
    _assert_close((actual, after), subject.run[1])
    assert_state_stable(state, after)


@_law
def _state_stable(subject: Subject) -> None:
    """No step changes structure, shape, dtype or weak type of the state."""
    start = subject.run[0][1]
    assert_state_stable(jax.eval_shape(subject.tx.init, subject.params), start)
    for _, state in subject.run[1:]:
        assert_state_stable(start, state)


@_law
def _mixed_dtypes(subject: Subject) -> None:
    """bfloat16 parameters with float32 gradients, and the reverse: state stable."""

    def cast(tree, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    short, wide = jnp.bfloat16, jnp.float32
    for of_params, of_gradients in ((short, wide), (wide, short)):
        params = cast(subject.params, of_params)
        gradient = cast(subject.gradients[0], of_gradients)
        # Types alone are claimed, so nothing is computed.
        state = jax.eval_shape(subject.tx.init, params)
        updates, after = jax.eval_shape(subject.tx.update, gradient, state, params)
        assert_state_stable(state, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradient)


@_law
def _extra_args(subject: Subject) -> None:
    """Extra arguments meant for neighbours are let through."""
    tx = optax.chain(subject.make(), optax.scale_by_learning_rate(1.0))
    state = tx.init(subject.params)
    jax.eval_shape(
        functools.partial(tx.update, value=jnp.float32(1.0), other=None),
        subject.gradients[0],
        state,
        subject.params,
    )


@_law
def _empty_tree(subject: Subject) -> None:
    """A tree without leaves passes, and comes back."""
    for tree in ({}, ()):
        state = subject.tx.init(tree)
        updates, after = subject.tx.update(tree, state, tree)
        assert updates == tree
        assert_state_stable(state, after)


@_law
def _odd_leaves(subject: Subject) -> None:
    """None, MaskedNode, scalars, vectors and leaves without elements pass."""
    params = {
        **subject.params,
        "none": None,
        "masked": optax.MaskedNode(),
        "scalar": jnp.float32(2.0),
        "vector": jnp.ones(3),
        "empty": jnp.zeros((0, 4)),
        "empty_vector": jnp.zeros(0),
    }
    # The plain leaves get the plain gradients, so that the two steps can be compared.
    gradient = {**gradients_like(params, 0), **subject.gradients[0]}
    state = subject.tx.init(params)
    beside = subject.beside(subject.tx, (params, state, gradient))
    _, after, shapes = beside.out
    assert_state_stable(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, gradient)
    # The plain leaves are computed only where the expressions leave doubt.
    wanted = set(params) - (set(subject.params) if beside.runs_as_plain else set())

    step: Any = subject.tx.update

    @jax.jit
    def update(gradient, state, params):
        updates, _ = step(gradient, state, params)
        return {name: updates[name] for name in wanted}

    updates = update(gradient, state, params)
    if not beside.runs_as_plain:
        plain = {name: updates[name] for name in subject.params}
        _assert_close(optax.apply_updates(subject.params, plain), subject.run[1][0])
    assert np.isfinite(updates["scalar"]) and updates["scalar"] != 0
    assert np.all(updates["vector"] != 0)
    sizes = {x.size for x in jax.tree.leaves(after)}
    assert 0 not in sizes, "the state holds arrays without elements"


@_law
def _pmap(subject: Subject) -> None:
    """``jax.pmap`` with averaged gradients equals one device."""
    count = min(2, jax.local_device_count())
    devices = jax.local_devices()[:count]

    def one_step(params, state, gradient):
        return step_of(subject.tx)(params, state, gradient)

    def step(params, state, gradient):
        gradient = jax.lax.pmean(gradient, "replica")
        # A call of its own, which the traced program shows by its name.
        return jax.jit(one_step)(params, state, gradient)

    def replicate(tree):
        return jax.tree.map(lambda x: np.stack([np.asarray(x)] * count), tree)

    parallel = jax.pmap(step, axis_name="replica", devices=devices)
    if subject.is_called_by(parallel, replicate(subject.start), "one_step"):
        return  # every replica makes the plain step, of the same mean
    params, state = replicate(subject.run[0])
    for gradient, (expected, _) in zip(
        subject.gradients[:2], subject.run[1:], strict=False
    ):
        params, state = parallel(params, state, replicate(gradient))
        for replica in range(count):
            own = jax.tree.map(lambda x, i=replica: np.asarray(x)[i], params)
            _assert_close(own, expected)


@_law
def _donation(subject: Subject) -> None:
    """Parameters and state may be donated: no buffer stands in two places.

    Donation does not change what a program computes, so none is compiled: what may go
    wrong is one buffer given away twice, or one that no result can use.
    """
    params = jax.tree.map(jnp.copy, subject.params)
    state = subject.tx.init(params)
    buffers = [_buffer(leaf) for leaf in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers), "a buffer stands in two places"
    step = jax.jit(step_of(subject.tx), donate_argnums=(0, 1))
    # JAX warns of buffers that no result can use while it lowers.
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step.lower(params, state, subject.gradients[0])
    unused = [str(w.message) for w in found if "donated" in str(w.message)]
    assert not unused, unused


def _buffer(leaf: jax.Array) -> tuple[Any, int]:
    """Where an array's first shard lies."""
    # The buffer of an array of keys is that of the numbers behind the keys.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    shard = leaf.addressable_shards[0]
    return shard.device, shard.data.unsafe_buffer_pointer()
