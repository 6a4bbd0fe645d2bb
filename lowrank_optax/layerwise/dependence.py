"""Which inputs a result of a traced function depends on, layer by layer.

A walk over the function's jaxpr, conservative: what it does not know counts as a
mixture of layers. Nothing is computed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

_ROUNDING = "lowrank/rounding"
OWN, MIXED = "own", "mixed"  # of the layer whose turn it is in a loop; of several


class Dependence(NamedTuple):
    """What one array is computed from.

    Attributes:
      names: of the inputs.
      place: None if no stacked input is among them; ``(axis, run)`` if entries
        ``l run`` to ``(l + 1) run`` along that axis depend on layer l alone; ``OWN`` or
        ``MIXED``.
    """

    names: frozenset[str] = frozenset()
    place: Any = None


NOTHING = Dependence()
RANDOM = "one draw of random numbers for all layers"


def dependences(
    closed: Any, inputs: Sequence[Dependence], layers: int
) -> list[Dependence]:
    """Returns what every output of a jaxpr depends on.

    Args:
      closed: the function, from ``jax.make_jaxpr``.
      inputs: one per input.
      layers: size of the axis of layers.
    """
    return _Walk(layers).outputs(closed, list(inputs))


def only_rounds(decision: jax.Array) -> jax.Array:
    """Marks a decision between two ways to compute the same: it couples nothing."""
    return checkpoint_name(decision, _ROUNDING)


def join(*parts: Dependence) -> Dependence:
    """Returns the dependence of what is computed entry by entry from all of these."""
    names: frozenset[str] = frozenset()
    places = {part.place for part in parts if part.place is not None}
    place = places.pop() if len(places) == 1 else MIXED if places else None
    return Dependence(names.union(*(part.names for part in parts)), place)


# Entry by entry, whatever the shape.
_ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt
    ceil clamp clz conj convert_element_type copy copy_p cos cosh div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le log log1p logistic lt
    max mesh_cast min mul name ne neg nextafter not or population_count pow pvary real
    reduce_precision rem reshard round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh xor
    """.split()
)
# Matrix by matrix, over the last two axes.
_MATRICES = frozenset(
    "cholesky eigh geqrf householder_product lu qr svd triangular_solve".split()
)
# Along one axis, or some: the parameter that says which.
_ALONG = {
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), "axis"),
    "rev": "dimensions",
    "sort": "dimension",
}
_LOOPS = ("cond", "scan", "while")


class _Walk:
    """The rules, for stacks of so many layers."""

    def __init__(self, layers: int):
        self.layers = layers

    def outputs(self, jaxpr: Any, inputs: list[Dependence]) -> list[Dependence]:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Dependence] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Dependence:
            if isinstance(atom, core.Literal):
                return NOTHING
            return known.get(atom, NOTHING)

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[Dependence]) -> list[Dependence]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        rule: Any = getattr(self, f"_{name}", None)
        if name == "random_bits" and self._one_draw(eqn):
            return [Dependence(ins[0].names | {RANDOM}, MIXED)] * count
        if name == "name" and eqn.params["name"] == _ROUNDING:
            return [NOTHING]
        if name in _LOOPS:
            return rule(eqn, ins)
        for body in _bodies(eqn):
            inner = getattr(body, "jaxpr", body)
            if len(inner.invars) == len(ins) and len(inner.outvars) == count:
                return self.outputs(body, ins)
        if name == "optimization_barrier":
            return ins
        whole = join(*ins)
        places = {one.place for one in ins} - {None}
        if not places or places == {OWN}:
            return [whole] * count
        if places & {OWN, MIXED}:
            return [Dependence(whole.names, MIXED)] * count
        if name in ("dot_general", "gather"):
            return [Dependence(whole.names, rule(eqn, ins))] * count
        if whole.place == MIXED or name in _ELEMENTWISE:
            return [whole] * count
        place: Any = MIXED
        axis = whole.place[0]
        if name.startswith("reduce_") or name in ("argmax", "argmin"):
            place = _without(whole.place, eqn.params.get("axes", (axis,)))
        elif name in _ALONG:
            axes = eqn.params[_ALONG[name]]
            axes = axes if isinstance(axes, tuple) else (axes,)
            place = MIXED if axis in axes else whole.place
        elif name in _MATRICES:
            place = whole.place if axis < eqn.invars[0].aval.ndim - 2 else MIXED
        elif rule is not None:
            place = rule(eqn, ins, whole.place)
        return [Dependence(whole.names, place)] * count

    def _one_draw(self, eqn: Any) -> bool:
        """Whether one key makes the numbers of all layers."""
        shape = eqn.outvars[0].aval.shape
        return not eqn.invars[0].aval.shape and shape[:1] == (self.layers,)

    # --- branches and loops ---------------------------------------------------------

    def _cond(self, eqn: Any, ins: list[Dependence]) -> list[Dependence]:
        which, rest = _decides(ins[0]), ins[1:]
        branches = [self.outputs(body, rest) for body in eqn.params["branches"]]
        return [join(which, *outs) for outs in zip(*branches, strict=True)]

    def _while(self, eqn: Any, ins: list[Dependence]) -> list[Dependence]:
        a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        tests, consts = ins[:a], ins[a : a + b]

        def turn(carry: list[Dependence]) -> list[Dependence]:
            (more,) = self.outputs(eqn.params["cond_jaxpr"], [*tests, *carry])
            after = self.outputs(eqn.params["body_jaxpr"], [*consts, *carry])
            return [join(_decides(more), one) for one in after]

        return _settled(turn, ins[a + b :])

    def _scan(self, eqn: Any, ins: list[Dependence]) -> list[Dependence]:
        # What is scanned has an axis less in the body; jax versions count it otherwise.
        inner = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
        b = len(eqn.outvars) - _scanned(eqn.outvars, inner.outvars)
        a = len(ins) - _scanned(eqn.invars, inner.invars) - b
        consts, xs = ins[:a], ins[a + b :]
        by_layer = any(isinstance(x.place, tuple) and x.place[0] == 0 for x in xs)
        entries = [Dependence(x.names, _entry(x.place)) for x in xs]

        def body(carry: list[Dependence]) -> list[Dependence]:
            return self.outputs(eqn.params["jaxpr"], [*consts, *carry, *entries])

        def turn(carry: list[Dependence]) -> list[Dependence]:
            return [
                Dependence(one.names, MIXED) if by_layer and one.place == OWN else one
                for one in body(carry)[:b]
            ]

        def stacked(place: Any) -> Any:
            if place == OWN and by_layer:
                return 0, eqn.params["length"] // self.layers
            return (place[0] + 1, place[1]) if isinstance(place, tuple) else place

        carry = _settled(turn, ins[a : a + b])
        ys = [Dependence(one.names, stacked(one.place)) for one in body(carry)[b:]]
        return [*carry, *ys]

    # --- what rearranges: the place of the result -----------------------------------

    def _broadcast_in_dim(self, eqn: Any, ins: Any, place: Any) -> Any:
        return eqn.params["broadcast_dimensions"][place[0]], place[1]

    def _reshape(self, eqn: Any, ins: Any, place: Any) -> Any:
        before = math.prod(eqn.invars[0].aval.shape[: place[0]])
        shape = eqn.outvars[0].aval.shape
        for axis, size in enumerate(shape):
            fits = size and size % self.layers == 0
            if fits and math.prod(shape[:axis]) == before:
                return axis, size // self.layers
        return MIXED

    def _squeeze(self, eqn: Any, ins: Any, place: Any) -> Any:
        return _without(place, eqn.params["dimensions"])

    def _transpose(self, eqn: Any, ins: Any, place: Any) -> Any:
        return tuple(eqn.params["permutation"]).index(place[0]), place[1]

    def _concatenate(self, eqn: Any, ins: Any, place: Any) -> Any:
        return MIXED if eqn.params["dimension"] == place[0] else place

    def _split(self, eqn: Any, ins: Any, place: Any) -> Any:
        return MIXED if eqn.params["axis"] == place[0] else place

    def _top_k(self, eqn: Any, ins: Any, place: Any) -> Any:
        ndim = eqn.invars[0].aval.ndim
        return MIXED if eqn.params.get("axis", -1) % ndim == place[0] else place

    def _pad(self, eqn: Any, ins: Any, place: Any) -> Any:
        return place if eqn.params["padding_config"][place[0]] == (0, 0, 0) else MIXED

    def _slice(self, eqn: Any, ins: Any, place: Any) -> Any:
        return _whole_axis(eqn, place)

    def _dynamic_slice(self, eqn: Any, ins: Any, place: Any) -> Any:
        return MIXED if any(x.place for x in ins[1:]) else _whole_axis(eqn, place)

    def _dynamic_update_slice(self, eqn: Any, ins: Any, place: Any) -> Any:
        whole, part = (atom.aval.shape[place[0]] for atom in eqn.invars[:2])
        return MIXED if any(x.place for x in ins[2:]) or whole != part else place

    def _gather(self, eqn: Any, ins: Any) -> Any:
        numbers, (source, index) = eqn.params["dimension_numbers"], ins
        shape = eqn.invars[0].aval.shape
        out = range(eqn.outvars[0].aval.ndim)
        batch = [i for i in out if i not in numbers.offset_dims]
        found = []
        if source.place is not None:
            axis, shared = source.place[0], numbers.operand_batching_dims
            gone = (*numbers.collapsed_slice_dims, *shared)
            if axis in shared:
                at = numbers.start_indices_batching_dims[shared.index(axis)]
                found.append((batch[at], source.place[1]))
            elif axis in gone or eqn.params["slice_sizes"][axis] != shape[axis]:
                return MIXED
            else:
                kept = [i for i in range(len(shape)) if i not in gone]
                at = numbers.offset_dims[kept.index(axis)]
                found.append((at, source.place[1]))
        if index.place is not None:
            if index.place[0] >= len(batch):
                return MIXED
            found.append((batch[index.place[0]], index.place[1]))
        return found[0] if len(set(found)) == 1 else MIXED

    def _dot_general(self, eqn: Any, ins: Any) -> Any:
        summed, batch = eqn.params["dimension_numbers"]
        found, free = [], len(batch[0])
        for one, atom, gone, shared in zip(ins, eqn.invars, summed, batch, strict=True):
            rest = [i for i in range(atom.aval.ndim) if i not in (*gone, *shared)]
            if one.place is not None:
                axis, run = one.place
                if axis in gone:
                    return MIXED
                place = (
                    shared.index(axis) if axis in shared else free + rest.index(axis)
                )
                found.append((place, run))
            free += len(rest)
        return found[0] if len(set(found)) == 1 else MIXED


def _bodies(eqn: Any) -> list[Any]:
    """Returns the functions that an equation may call."""
    found = (eqn.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    return [body for body in found if body is not None]


def _settled(turn: Callable, carry: list[Dependence]) -> list[Dependence]:
    """Repeats a loop's body until nothing new flows into what it carries."""
    while True:
        after = [join(*pair) for pair in zip(carry, turn(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _decides(one: Dependence) -> Dependence:
    """What a decision brings into all that hangs on it."""
    return one if one.place in (None, OWN) else Dependence(one.names, MIXED)


def _entry(place: Any) -> Any:
    """The place of one entry along axis 0."""
    if not isinstance(place, tuple):
        return place
    return OWN if place[0] == 0 else (place[0] - 1, place[1])


def _whole_axis(eqn: Any, place: tuple[int, int]) -> Any:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return place if before[place[0]] == after[place[0]] else MIXED


def _scanned(outside: Any, inside: Any) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(x.aval.ndim != y.aval.ndim for x, y in pairs)


def _without(place: tuple[int, int], axes: Sequence[int]) -> Any:
    if place[0] in axes:
        return MIXED
    return place[0] - sum(axis < place[0] for axis in axes), place[1]
