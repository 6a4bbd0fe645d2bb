"""``CONTENDERS``: the optimizers that are compared, each at learning rate 1.

The update of each is its learning rate times a direction, so that a program compiled
once serves all rates.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from lowrank_optax.quantization import companded, stochastic_round, symmetric

Build = Callable[[int], optax.GradientTransformation]  # of the rank
GAP = 50  # steps between two bases, of all


class Contender(NamedTuple):
    """An optimizer in the comparison.

    Attributes:
      build: makes it, for the matrices.
      start: the rate at which its search begins.
      options: what differs from the method's own defaults, as text.
      kind: "baseline", "method", or "trial" for what is no method of the library.
      tables: what embedding and head get in the place of Adam, a name of ``TABLES``.
      whole: whether it has all leaves of the model, as a user would have it.
    """

    build: Build
    start: float
    options: str = ""
    kind: str = "method"
    tables: str = "adam"
    whole: bool = False


def of_library(name: str, **options: Any) -> Build:
    """Builds a method for stacks of layers, at the rank and the gap of the runs."""
    factory = lro.METHODS[name].factory
    taken = inspect.signature(factory).parameters

    def build(rank: int) -> optax.GradientTransformation:
        given: dict[str, Any] = {"layer_axis": 0, "update_proj_gap": GAP, "heads": 4}
        if "rank" in taken and taken["rank"].default != 1:
            given["rank"] = rank
        encodes = "min_size" in taken and repr(taken["min_size"].default) == "4096"
        if encodes and (name != "muon" or "bits" in options):
            given["min_size"] = 0  # else moments as small as these are not encoded
        given = {key: value for key, value in given.items() if key in taken}
        return factory(1.0, **(given | options))

    return build


def _optax_muon(rank: int) -> optax.GradientTransformation:
    del rank
    # Without dimension numbers it would give stacks of matrices to Adam.
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    return optax.contrib.muon(
        1.0,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: axes, params
        ),
    )


def _optax_galore(rank: int) -> optax.GradientTransformation:
    return _unstacked(optax.contrib.galore(1.0, rank, GAP, 0.25))


def _unstacked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows every layer of a stack as a matrix, to what takes matrices alone."""

    def layers(tree: Any) -> Any:
        return jax.tree.map(tuple, tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        treedef = jax.tree.structure(updates)
        out, state = tx.update(layers(updates), state, layers(params))
        stacks = [jnp.stack(leaf) for leaf in treedef.flatten_up_to(out)]
        return treedef.unflatten(stacks), state

    return optax.GradientTransformation(lambda params: tx.init(layers(params)), update)


BASELINES = {
    "optax.adamw": Contender(lambda rank: optax.adamw(1.0, weight_decay=0.0), 0.01),
    "optax.sgd": Contender(lambda rank: optax.sgd(1.0, 0.9, nesterov=True), 1.0),
    "optax.lion": Contender(lambda rank: optax.lion(1.0, weight_decay=0.0), 1e-3),
    "optax.adafactor": Contender(
        lambda rank: optax.adafactor(
            1.0, multiply_by_parameter_scale=False, min_dim_size_to_factor=16
        ),
        0.01,
    ),
    "optax.contrib.muon": Contender(_optax_muon, 0.02),
    "optax.contrib.galore": Contender(_optax_galore, 0.02),
}

# Where the search of a rate begins; 0.02 for those that are not here.
_STARTS = {
    "adamw_8bit": 0.01,
    "adamw_4bit": 0.01,
    "column_sgd": 2e-3,
    "frugal": 5e-3,
    "sinkgd": 0.05,
    "racs": 0.05,
    "ldadam": 0.01,
}


def _polar(
    bits: int | None, *, normalized: bool, shape: str = "width", **codec: Any
) -> Build:
    """Builds Muon of plain parts: leading axes are batch in all of them."""

    def build(rank: int) -> optax.GradientTransformation:
        del rank
        mean: Any = lro.momentum(0.95, True)
        if bits is not None:
            mean = lro.quantize_state(
                mean, symmetric(bits, **codec), None, 0, stochastic=bits == 4
            )
        polar = lro.orthogonalize("quintic", shape_factor=shape)
        even = [lro.normalize_outputs()] if normalized else []
        return optax.chain(mean, polar, *even, optax.scale(-1.0))

    return build


def _few_bit_momentum(bits: int, group: int) -> optax.GradientTransformation:
    codec = symmetric(bits, group)
    return lro.quantize_state(
        lro.momentum(0.9, False), codec, None, 0, stochastic=bits == 4
    )


# What embedding and head get.
TABLES: dict[str, optax.GradientTransformation] = {
    "adam": optax.scale_by_adam(),
    "adam, 8 bits": lro.quantize_state(optax.scale_by_adam()),
    "adam, 4 bits": lro.quantize_state(
        optax.scale_by_adam(), companded(64, bits=4),
        companded(64, signed=False, bits=4), stochastic=True,
    ),
    "factored": lro.scale_by_matrix_factored_rms(),
    "factored, 8-bit momentum": optax.chain(
        lro.scale_by_matrix_factored_rms(), _few_bit_momentum(8, 128)
    ),
    "factored, 4-bit momentum": optax.chain(
        lro.scale_by_matrix_factored_rms(), _few_bit_momentum(4, 64)
    ),
    "sinkhorn": lro.normalize_rows_and_columns(),
}  # fmt: skip
TABLES = {name: optax.chain(tx, optax.scale(-1.0)) for name, tx in TABLES.items()}


def _coarse_momentum(
    levels: int, group: int, dither: bool = False
) -> optax.GradientTransformation:
    """A momentum rounded at random to so many levels on either side of zero.

    It is kept in float32, for the look of it: the bytes are told apart. ``dither``
    takes the random number off again when it decodes, which halves the variance.
    """

    def rounded(x: jax.Array, key: jax.Array) -> jax.Array:
        blocks = x.reshape(-1, group)
        step = jnp.max(jnp.abs(blocks), -1, keepdims=True) / levels
        ratio = blocks / jnp.where(step > 0, step, 1)
        if dither:
            u = jax.random.uniform(key, blocks.shape)
            return ((jnp.floor(ratio + u) + 0.5 - u) * step).reshape(x.shape)
        return (stochastic_round(ratio, key) * step).reshape(x.shape)

    def init(params: Any) -> Any:
        return jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count, mu = state
        keys = optax.tree.split_key_like(jax.random.key(count), updates)
        mu = jax.tree.map(lambda g, m: 0.95 * m + 0.05 * g, updates, mu)
        out = jax.tree.map(lambda g, m: 0.95 * m + 0.05 * g, updates, mu)
        return out, (count + 1, jax.tree.map(rounded, mu, keys))

    return optax.GradientTransformation(init, update)


def _behind(mean: Callable[[int], Any]) -> Build:
    """Builds an even polar factor of some other mean of gradients."""

    def build(rank: int) -> optax.GradientTransformation:
        polar = lro.orthogonalize("quintic", shape_factor="width")
        return optax.chain(
            mean(rank), polar, lro.normalize_outputs(), optax.scale(-1.0)
        )

    return build


def _in_bracket(projector: Callable[[int], Any], rest: float) -> Any:
    """Returns a momentum in a subspace, with this step's remainder beside it."""

    def mean(rank: int) -> Any:
        momentum = lro.quantize_state(
            lro.momentum(0.95, True), symmetric(8, 64), None, 0
        )
        return lro.chain(
            lro.project(projector(rank), layer_axis=0),
            momentum,
            lro.complement(scale=rest),
            lro.backproject(),
        )

    return mean


def _low_rank_polar(rank: int) -> optax.GradientTransformation:
    """An orthogonalized momentum of low rank, and the remainder by columns."""
    bracket = lro.chain(
        lro.project(lro.power(rank, GAP), layer_axis=0),
        lro.momentum(0.95, True),
        lro.orthogonalize("quintic", shape_factor="sqrt_long"),
        lro.complement(lro.scale_by_column_sgd(), scale=0.1),
        lro.backproject(),
    )
    return optax.chain(bracket, optax.scale(-1.0))


TRIALS = {
    "even muon": Contender(_polar(None, normalized=True), 0.02),
    "even muon, 8 bits": Contender(_polar(8, normalized=True, group=128), 0.04),
    "even muon, 4 bits": Contender(_polar(4, normalized=True, group=64), 0.04),
    "even muon, 2 bits": Contender(
        _behind(lambda rank: _coarse_momentum(1, 32)), 0.04, "simulated"
    ),
    "even muon, 4 bits, groups of 32": Contender(
        _polar(4, normalized=True, group=32), 0.04
    ),
    "even muon, 4 bits, dithered, groups of 32": Contender(
        _behind(lambda rank: _coarse_momentum(7, 32, dither=True)), 0.04, "simulated"
    ),
    "even muon, 8 bits, rms": Contender(
        _polar(8, normalized=True, shape="sqrt_long", group=256), 0.01
    ),
    "muon, rms": Contender(_polar(None, normalized=False, shape="sqrt_long"), 0.005),
    "even muon, Haar means, 8 bits": Contender(
        _behind(_in_bracket(lambda rank: lro.wavelet(1), 0.3)), 0.04
    ),
    "even muon, Haar means, 8 bits, rest 0.1": Contender(
        _behind(_in_bracket(lambda rank: lro.wavelet(1), 0.1)), 0.04
    ),
    "even muon, Haar means, 8 bits, rest 1": Contender(
        _behind(_in_bracket(lambda rank: lro.wavelet(1), 1.0)), 0.04
    ),
    "even muon, Haar means of 4, 8 bits": Contender(
        _behind(_in_bracket(lambda rank: lro.wavelet(2), 0.3)), 0.04
    ),
    "even muon, Haar means of 4, 8 bits, rest 0.1": Contender(
        _behind(_in_bracket(lambda rank: lro.wavelet(2), 0.1)), 0.04
    ),
    "even muon, Haar means of 8, 8 bits": Contender(
        _behind(_in_bracket(lambda rank: lro.wavelet(3), 0.3)), 0.04
    ),
    "even muon, no momentum": Contender(_behind(lambda rank: optax.identity()), 0.04),
    "even muon, rank r, 8 bits": Contender(
        _behind(_in_bracket(lambda rank: lro.power(rank, GAP), 0.3)), 0.04
    ),
    "polar of rank r, columns": Contender(_low_rank_polar, 0.01),
    "muon, rows, 4 bits": Contender(
        of_library("muon", fraction=0.25, bits=4), 0.04, "fraction=0.25, bits=4"
    ),
}

CONTENDERS: dict[str, Contender] = {
    **{name: one._replace(kind="baseline") for name, one in BASELINES.items()},
    **{
        name: Contender(of_library(name), _STARTS.get(name, 0.02))
        for name in lro.METHODS
    },
    **{name: one._replace(kind="trial") for name, one in TRIALS.items()},
    "galore, matched": Contender(
        of_library("galore", match="adamw"), 0.005, 'match="adamw"'
    ),
    "subtrack, matched": Contender(
        of_library("subtrack", match="adamw"), 0.005, 'match="adamw"'
    ),
    "muon, 8 bits": Contender(of_library("muon", bits=8), 0.02, "bits=8"),
    "muon, 4 bits": Contender(of_library("muon", bits=4), 0.02, "bits=4"),
    "even_muon, 4 bits": Contender(of_library("even_muon", bits=4), 0.02, "bits=4"),
    "even_muon, beta 0.9": Contender(
        of_library("even_muon", beta=0.9), 0.02, "beta=0.9"
    ),
    "even_muon, beta 0.8": Contender(
        of_library("even_muon", beta=0.8), 0.02, "beta=0.8"
    ),
    "even_muon, all leaves": Contender(
        of_library("even_muon"), 0.02, "every leaf at one rate", whole=True
    ),
    "even_muon, all leaves, tables at 4": Contender(
        of_library("even_muon", full_scale=4.0), 0.02, "full_scale=4", whole=True
    ),
    "optax.adamw, all leaves": Contender(
        lambda rank: optax.adamw(1.0, weight_decay=0.0), 0.005, whole=True
    ),
    "gwt, level 3": Contender(of_library("gwt", level=3), 0.02, "level=3"),
}
