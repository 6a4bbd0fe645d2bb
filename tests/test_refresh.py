"""Refresh truth: how often a basis is computed, and that nothing else computes one."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.bracket.plan import LeafPlan
from lowrank_optax.bracket.planner import shifts
from lowrank_optax.leaves.clock import next_count

LAYERS, GAP = 4, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Counting(lro.OrthonormalProjector):
    """Notes (path, layer, epoch) whenever a basis is really computed."""

    log: list = dataclasses.field(default_factory=list)

    def compute(self, matrix, gradient, old, at):
        def note(layer, epoch):
            self.log.append((matrix.path, int(layer), int(epoch)))

        jax.debug.callback(note, at.layer, at.epoch)
        return jnp.linalg.qr(gradient[:, : matrix.rank])[0]


def bracket(inner=None, gap=GAP, **options):
    projector = Counting(2, gap)
    tx = lro.chain(
        lro.project(projector, layer_axis=0, select=".", **options),
        inner or optax.scale_by_adam(),
        lro.backproject(),
    )
    return tx, projector.log


def params():
    return {"single": jnp.zeros((8, 6)), "stack": jnp.zeros((LAYERS, 6, 8))}


def noise(step):
    key = jax.random.fold_in(jax.random.key(0), step)
    keys = dict(zip(params(), jax.random.split(key), strict=True))
    return {n: jax.random.normal(keys[n], p.shape) for n, p in params().items()}


def run(tx, log, gradients):
    """Steps in jit; returns what was computed at every step, and the states."""
    state, computed, states = tx.init(params()), [], []
    update = jax.jit(tx.update)
    for gradient in gradients:
        _, state = update(gradient, state, params())
        jax.effects_barrier()
        computed.append([entry[:2] for entry in log])
        log.clear()
        states.append(state)
    return computed, states


EVERYTHING = sorted([("single", 0), *(("stack", layer) for layer in range(LAYERS))])


def test_factorizations_in_100_steps_are_those_of_the_schedule():
    tx, log = bracket()
    computed, _ = run(tx, log, map(noise, range(100)))
    for step, entries in enumerate(computed):
        assert sorted(entries) == (EVERYTHING if step % GAP == 0 else [])
    assert sum(map(len, computed)) == 13 * len(EVERYTHING)


def test_also_in_a_scan():
    tx, log = bracket()
    gradients = jax.tree.map(lambda *x: jnp.stack(x), *map(noise, range(20)))

    @jax.jit
    def steps(state):
        def step(state, gradient):
            return tx.update(gradient, state)[1], None

        return jax.lax.scan(step, state, gradients)[0]

    steps(tx.init(params()))
    jax.effects_barrier()
    counts = collections.Counter(entry[:2] for entry in log)
    assert counts == dict.fromkeys(EVERYTHING, 3)


def test_staggered_refreshes_spread_over_the_gap():
    tx, log = bracket(stagger=True)
    computed, _ = run(tx, log, map(noise, range(100)))
    assert sorted(computed[0]) == EVERYTHING
    # From then on every matrix once per gap, and never two on the same step.
    assert max(map(len, computed[1:])) == 1
    for start in range(1, 89, GAP):
        window = [entry for step in computed[start : start + GAP] for entry in step]
        assert sorted(window) == EVERYTHING
    for name in EVERYTHING:
        steps = [i for i, entries in enumerate(computed) if i and name in entries]
        assert set(np.diff(steps)) == {GAP}


@pytest.mark.parametrize("gap", [1, 3, 8, 200, 2**29 + 1, 2**30 - 1])
def test_counts_without_an_end(gap):
    count, last = jnp.int32(2**31 - 1 - gap - 3), 0
    for _ in range(6):
        following = next_count(count, gap)
        assert following.dtype == jnp.int32
        assert (int(following) - int(count) - 1) % gap == 0
        last += int(following) < int(count)
        count = following
        assert 0 < int(count) < 2**31 - gap
    assert last == 1
    # From where counters of Optax, and of states of earlier versions, end.
    assert 0 < int(next_count(jnp.int32(2**31 - 1), gap)) <= 2**31 - 2**29
    assert (int(next_count(jnp.int32(2**31 - 1), gap)) - 2**31) % gap == 0


def test_a_gap_that_the_counter_does_not_reach_twice():
    for count in (0, 2**31 - 2, 2**31 - 1):
        expected = min(count + 1, 2**31 - 1)
        assert int(next_count(jnp.int32(count), 2**30)) == expected


@pytest.mark.parametrize("stagger", [False, True])
def test_refreshes_go_on_where_the_counter_ends(stagger):
    tx, log = bracket(stagger=stagger)
    state = tx.init(params())
    update, computed = jax.jit(tx.update), []
    # A first step at 0, which finds all bases, and then near the end.
    for step in range(5 * GAP + 1):
        _, state = update(noise(step), state, params())
        jax.effects_barrier()
        computed.append([entry[:2] for entry in log])
        log.clear()
        if step == 0:
            near = jnp.int32(2**31 - 1 - 3 * GAP)
            state = state._replace(count=near - near % GAP + 1)
    assert int(state.count) < 2**31 - GAP
    for start in range(1, 5 * GAP + 1, GAP):
        window = [entry for step in computed[start : start + GAP] for entry in step]
        assert sorted(window) == EVERYTHING


@pytest.mark.parametrize("gap", [1, 3, 8, 200])
def test_phases_are_spread_evenly(gap):
    shapes = [(3, 6, 8), (6, 8), (7, 6, 8), (8, 6)]
    leaves = []
    for shape in shapes:
        batch = tuple(range(len(shape) - 2))
        rows, columns = (len(shape) - 2,), (len(shape) - 1,)
        matrix = lro.Matrix("w", shape, batch, rows, columns, "left", 2)
        leaves.append(LeafPlan("w", shape, np.dtype("float32"), matrix, "", 0))
    spread = [p for leaf in shifts(leaves, gap, True) for p in leaf]
    assert len(spread) == 12
    per_step = np.bincount(spread, minlength=gap)
    assert len(per_step) == gap
    assert per_step.max() <= -(-12 // gap)
    together = shifts(leaves, gap, False)
    assert {p for leaf in together for p in leaf} == {0}


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("when", [0, GAP])
def test_a_refresh_that_could_not_be_is_made_up_for(bad, when):
    tx, log = bracket(inner=optax.identity())

    def gradient(step):
        gradient = noise(step)
        if step in (when, when + 1):
            gradient["stack"] = gradient["stack"].at[2].set(bad)
        return gradient

    computed, states = run(tx, log, map(gradient, range(2 * GAP + 1)))
    others = [entry for entry in EVERYTHING if entry != ("stack", 2)]
    assert sorted(computed[when]) == others
    assert computed[when + 1] == []
    assert computed[when + 2] == [("stack", 2)]
    assert sorted(computed[2 * GAP]) == EVERYTHING
    assert sum(map(len, computed)) == 3 * len(EVERYTHING)
    # Owed meanwhile; what was there stays there.
    assert np.asarray(states[when].pending["stack"]).tolist() == [
        layer == 2 for layer in range(LAYERS)
    ]
    before = tx.init(params()) if when == 0 else states[when - 1]
    np.testing.assert_array_equal(
        before.basis["stack"][2], states[when + 1].basis["stack"][2]
    )
    assert not np.asarray(states[when + 2].pending["stack"]).any()


def test_a_basis_that_fails_is_not_stored():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Failing(lro.OrthonormalProjector):
        def compute(self, matrix, gradient, old, at):
            return jnp.where(at.epoch == 1, jnp.nan, old)

    tx = lro.chain(
        lro.project(Failing(2, 2), select="single"), optax.identity(), lro.backproject()
    )
    state = tx.init(params())
    update = jax.jit(tx.update)
    owed = []
    for step in range(5):
        updates, state = update(noise(step), state)
        assert np.isfinite(updates["single"]).all()
        owed.append(bool(state.pending["single"]))
    assert owed == [False, False, True, True, False]


def accumulate(every):
    return optax.MultiSteps(optax.scale_by_adam(), every).gradient_transformation()


def test_accumulation_inside_refreshes_at_boundaries_only():
    every = 3
    tx, log = bracket(accumulate(every), gap=2)
    computed, states = run(tx, log, map(noise, range(18)))
    # 18 gradients are 6 steps of the inner optimizer: bases at its steps 0, 2, 4.
    due = [step for step, entries in enumerate(computed) if entries]
    assert due == [0, 6, 12]
    assert all(sorted(computed[step]) == EVERYTHING for step in due)
    assert [int(state.count) for state in states] == [(i + 1) // 3 for i in range(18)]


def test_accumulation_does_not_make_up_in_the_middle_of_a_sum():
    tx, log = bracket(accumulate(3), gap=2)

    def gradient(step):
        return jax.tree.map(jnp.zeros_like, params()) if step == 0 else noise(step)

    computed, _ = run(tx, log, map(gradient, range(7)))
    assert [step for step, entries in enumerate(computed) if entries] == [3, 6]


# The program itself.

FACTORIZATIONS = {"svd", "qr", "cholesky", "eigh", "geqrf", "householder_product"}
PROJECTORS = {"svd": lro.svd(2, 5), "power": lro.power(2, 5)}


def inner_jaxprs(equation):
    for value in jax.tree.leaves(
        equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


def sites(jaxpr, inside=()):
    """Every (primitive, primitives around it) of a program."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, inside
        for inner in inner_jaxprs(equation):
            yield from sites(inner, (*inside, name))


def program(tx, tree):
    state = jax.eval_shape(tx.init, tree)
    return list(sites(jax.make_jaxpr(tx.update)(tree, state, tree).jaxpr))


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("projector", PROJECTORS.values(), ids=PROJECTORS)
def test_factorizations_stand_inside_a_cond(projector, stagger):
    tx = lro.galore(
        1e-2, projector=projector, layer_axis=0, stagger=stagger, select="."
    )
    found = [(n, around) for n, around in program(tx, params()) if n in FACTORIZATIONS]
    assert found
    assert all("cond" in around for _, around in found)

    # The stack goes layer by layer, each with a predicate of its own.
    def loops_over_layers(around):
        last_cond = len(around) - 1 - around[::-1].index("cond")
        return "scan" in around[:last_cond]

    assert any(loops_over_layers(around) for _, around in found)


def test_no_cond_was_batched_into_a_select():
    """A batched cond turns into select_n over both branches: then no cond is left."""
    tx, _ = bracket()
    vmapped = jax.vmap(lambda g, s: tx.update(g, s))
    tree = jax.tree.map(lambda p: jnp.stack([p, p]), params())
    state = jax.eval_shape(jax.vmap(tx.init), tree)
    batched = list(sites(jax.make_jaxpr(vmapped)(tree, state).jaxpr))
    # The walk sees the difference: a user's own vmap over brackets does that.
    assert any(n in FACTORIZATIONS and "cond" not in a for n, a in batched)
    assert not any(
        n in FACTORIZATIONS and "cond" not in a for n, a in program(tx, params())
    )


def test_no_full_size_work_without_a_refresh():
    """Outside cond and up, no product but the projections': three per matrix."""
    tx = lro.galore(1e-2, projector=lro.power(2, 5), select="single")
    dots = [a for n, a in program(tx, params()) if n == "dot_general"]
    assert sum("cond" not in around for around in dots) == 3
