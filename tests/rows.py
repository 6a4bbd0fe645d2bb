"""The methods under test: a new one is one more row."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import lowrank_optax as lro
from lowrank_optax.quantization import symmetric
from lowrank_optax.testing import Subject

GAP = 3  # a refresh at steps 0 and 3 of the five that every law runs


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with the options under test.

    `inner` is what stands in the bracket: for accumulation inside it, which
    `galore_adafactor`, with an inner of its own, does not offer. `orthonormal`: whether
    what the state has under "basis" is orthonormal at all times.
    """

    make: Callable[..., Any]
    params: Any = None
    inner: Any = None
    orthonormal: bool = True


def galore(inner=None, params=None, **options):
    options = {"learning_rate": 1e-2, "projector": lro.svd(2, GAP), **options}
    make = functools.partial(lro.galore, **options)
    if inner is not None:
        make = functools.partial(make, base_optimizer=inner)
    return Row(make, params, inner or optax.scale_by_adam())


def stacked_params():
    return {
        "layers": {"kernel": jnp.ones((3, 12, 6)), "bias": jnp.zeros((3, 6))},
        "out": {"kernel": -jnp.ones((5, 8))},
    }


def galore_8bit(params=None, **options):
    """Every matrix encoded, in blocks of which some are short."""
    options = {"block": 4, "min_size": 0, **options}
    options = {"learning_rate": 1e-2, "projector": lro.svd(2, GAP), **options}
    make = functools.partial(lro.galore_8bit, **options)
    return Row(make, params, optax.scale_by_adam())


def q_galore(params=None, **options):
    """Encoded throughout; the gap grows at the first refresh that compares."""
    options = {"block": 4, "min_size": 0, "basis_group": 4, **options}
    options = {"threshold": 0.0, "history": 1, **options}
    options = {"learning_rate": 1e-2, "projector": lro.svd(2, GAP), **options}
    make = functools.partial(lro.q_galore, **options)
    return Row(make, params, optax.scale_by_adam(), orthonormal=False)


# No accumulation inside: an inner of their own, or a step of the complement.
NOT_INSIDE = (lro.natural_galore, lro.sumo, lro.frugal, lro.gwt)
# Where they are not Adam's own.
BETAS = {lro.ldadam: (0.908, 0.99), lro.alice: (0.9, 0.9)}
# Bases that drift between decompositions, and column numbers in place of bases.
OTHER_BASES = (lro.online_subspace_descent, lro.coap, lro.dct_adamw)


def row(method, *, params=None, **options):
    """A method around Adam or `base_optimizer`, refreshed every GAP steps."""
    taken = inspect.signature(method).parameters
    adam = optax.scale_by_adam(*BETAS.get(method, ()))
    size = {"rank": 2, "update_proj_gap": GAP}
    size = {name: n for name, n in size.items() if name in taken}
    if "projector" in options:
        size = {}
    hosts = "base_optimizer" in taken and method not in NOT_INSIDE
    if options.get("error_feedback") or not hosts:
        adam = None
    options = {"learning_rate": 1e-2, **size, **options}
    make = functools.partial(method, **options)
    inner = options.get("base_optimizer", adam)
    return Row(make, params, inner, method not in OTHER_BASES)


RAW = optax.chain(lro.scale_by_raw_adam(), lro.scale_by_bias_correction())

# Exact SVD where the projector is not the point: it compiles fastest.
ROWS = {
    "galore_power": galore(projector=lro.power(2, GAP)),
    "galore_svd": galore(weight_decay=0.1),
    "galore_authors": Row(
        functools.partial(
            lro.galore,
            learning_rate=1e-2,
            rank=2,
            update_proj_gap=GAP,
            conventions="authors",
        ),
        inner=RAW,
    ),
    "galore_gaussian": galore(projector=lro.gaussian(2, GAP)),
    "galore_lion": galore(optax.scale_by_lion()),
    "galore_lion_4bit": galore(
        lro.quantize_state(
            optax.scale_by_lion(), symmetric(4, 4), None, 0, stochastic=True
        ),
        params=stacked_params(),
        layer_axis=0,
    ),
    "galore_momentum": galore(optax.trace(0.9)),
    "galore_both": galore(side="both"),
    "galore_stacked": galore(params=stacked_params(), layer_axis=0),
    "galore_staggered": galore(params=stacked_params(), layer_axis=0, stagger=True),
    "galore_rotate": galore(transport=lro.rotate_moments()),
    "galore_bf16": galore(
        mu_dtype=jnp.bfloat16,
        nu_dtype=jnp.bfloat16,
        projector=lro.svd(2, GAP, jnp.bfloat16),
    ),
    "galore_8bit": galore_8bit(),
    "galore_8bit_stacked": galore_8bit(
        params=stacked_params(), layer_axis=0, transport=lro.rotate_moments()
    ),
    "q_galore": q_galore(weight_decay=0.1),
    "q_galore_stacked": q_galore(
        params=stacked_params(), layer_axis=0, transport=lro.rotate_moments()
    ),
    "galore_adafactor": Row(
        functools.partial(
            lro.galore_adafactor,
            learning_rate=1e-2,
            projector=lro.svd(2, GAP),
            select="kernel",
        )
    ),
    "fira": row(lro.fira, projector=lro.svd(2, GAP)),
    "fira_authors": row(lro.fira, conventions="authors", base_optimizer=RAW),
    "fira_stacked": row(lro.fira, params=stacked_params(), layer_axis=0),
    "fira_both": row(lro.fira, side="both", granularity="tensor"),
    "subtrack": row(lro.subtrack, weight_decay=0.1),
    "subtrack_eta": row(
        lro.subtrack,
        step=0.1,
        max_angle=0.5,
        conventions="authors",
        base_optimizer=RAW,
    ),
    "subtrack_stacked": row(
        lro.subtrack, params=stacked_params(), layer_axis=0, stagger=True
    ),
    "subtrack_bf16": row(
        lro.subtrack,
        mu_dtype=jnp.bfloat16,
        nu_dtype=jnp.bfloat16,
        basis_dtype=jnp.bfloat16,
    ),
    "grass_walk": row(lro.grass_walk),
    "grass_jump": row(lro.grass_jump),
    "ldadam": row(lro.ldadam),
    "ldadam_feedback": row(lro.ldadam, error_feedback=True),
    "ldadam_stacked": row(
        lro.ldadam,
        params=stacked_params(),
        layer_axis=0,
        error_feedback=True,
        error_dtype=jnp.bfloat16,
    ),
    "osd": row(lro.online_subspace_descent, weight_decay=0.1),
    "osd_orthonormal": row(
        lro.online_subspace_descent,
        basis_optimizer=optax.lion(0.1),
        ortho_penalty=0.5,
        reorthonormalize_every=GAP,
        cold_start="random",
    ),
    "osd_stacked": row(
        lro.online_subspace_descent,
        params=stacked_params(),
        layer_axis=0,
        basis_preset="paper",
        conventions="authors",
        base_optimizer=RAW,
    ),
    "apollo": row(lro.apollo, weight_decay=0.1),
    "apollo_stacked": row(lro.apollo, params=stacked_params(), layer_axis=0),
    "apollo_mini": row(lro.apollo_mini, rank=1),
    "coap": row(lro.coap, reproject_factor=2),
    "coap_stacked": row(
        lro.coap,
        params=stacked_params(),
        layer_axis=0,
        transport=lro.rotate_moments(form="root"),
    ),
    "sara": row(lro.sara),
    "dct_adamw": row(lro.dct_adamw, weight_decay=0.1),
    "dct_adamw_feedback": row(
        lro.dct_adamw,
        params=stacked_params(),
        layer_axis=0,
        error_feedback=True,
        kind="dct2",
    ),
    "natural_galore": row(lro.natural_galore, select="kernel", history=3),
    "galore_plus": row(lro.galore_plus, heads=2),
    "frugal": row(lro.frugal),
    "gwt": row(lro.gwt, weight_decay=0.1),
    "gwt_stacked": row(
        lro.gwt,
        params=stacked_params(),
        layer_axis=0,
        level=1,
        wavelet="db2",
        detail_clip=10.0,
        conventions="authors",
    ),
    "sumo": row(lro.sumo, params=stacked_params(), layer_axis=0),
    # At rank 2 its float32 factors are no smaller than Adam's bfloat16 moments.
    "lora_pre": row(lro.lora_pre, rank=1, weight_decay=0.1),
    "muon_4bit": row(
        lro.muon, params=stacked_params(), layer_axis=0, bits=4, block=4, min_size=0
    ),
}
# A method without a row above has its plainest one.
_TRIED = {row.make.func for row in ROWS.values()}
PLAIN = {
    name: row(method.factory)
    for name, method in lro.METHODS.items()
    if method.factory not in _TRIED
}
ROWS |= PLAIN


@functools.cache
def subject(name):
    """The row's subject, with its plain run shared by all tests of a process."""
    return Subject(ROWS[name].make, ROWS[name].params)
