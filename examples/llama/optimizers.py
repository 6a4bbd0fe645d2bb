"""One registry, name -> optimizer. A method is added by a factory and a line."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.llama.config import Resolved, UsageError
from examples.llama.presets import PRESETS

# Takes the resolved flags, the learning rate, and what `--side` adds.
Factory = Callable[..., optax.GradientTransformation]
_NEVER = int(jnp.iinfo(jnp.int32).max)


def is_decayed(params: Any) -> Any:
    """True on matrices, False on the gains of norms."""

    def matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim > 1 and "norm" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(matrix, params)


def adamw(config: Resolved, lr: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        lr,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=is_decayed,
    )


def adamw_8bit(config: Resolved, lr: optax.Schedule) -> optax.GradientTransformation:
    decay = config.weight_decay or None
    betas = config.b1, config.b2
    return lro.adamw_8bit(lr, *betas, config.eps, decay, mask=is_decayed)


def low_rank(config: Resolved) -> dict[str, Any]:
    """What every low-rank method takes from the flags."""
    return {
        "rank": config.rank,
        "scale": config.scale,
        "b1": config.b1,
        "b2": config.b2,
        "eps": config.eps,
        "weight_decay": config.weight_decay or None,
        "mask": is_decayed if config.weight_decay else None,
        "layer_axis": 0,
        "mu_dtype": config.param_dtype,  # as the papers, and as Optax's AdamW
        "nu_dtype": config.param_dtype,
        "seed": config.seed,
    }


def at_every_step(method: Callable[..., optax.GradientTransformation]) -> Factory:
    """The factory of a method whose basis moves at every step."""
    return lambda config, lr, **side: method(lr, **low_rank(config), **side)


def at_gaps(method: Callable[..., optax.GradientTransformation]) -> Factory:
    """The factory of a method whose basis changes every `--update-proj-gap` steps."""

    def make(
        config: Resolved, lr: optax.Schedule, **side: Any
    ) -> optax.GradientTransformation:
        options = low_rank(config) | side
        return method(lr, update_proj_gap=config.update_proj_gap, **options)

    return make


def encoded(method: Callable[..., optax.GradientTransformation]) -> Factory:
    """The factory of a method of gaps whose moments are codes, of one type only."""

    def make(
        config: Resolved, lr: optax.Schedule, **side: Any
    ) -> optax.GradientTransformation:
        options = low_rank(config) | side
        del options["mu_dtype"], options["nu_dtype"]
        return method(lr, update_proj_gap=config.update_proj_gap, **options)

    return make


def galore_plus(
    config: Resolved, lr: optax.Schedule, **side: Any
) -> optax.GradientTransformation:
    """The kernels whose columns are cut into heads have one basis for all of them."""
    heads = PRESETS[config.preset].model.heads

    def parts(path: str) -> int:
        return heads if re.search(r"/[qkv]/", path) else 1

    options = low_rank(config) | side
    options["update_proj_gap"] = config.update_proj_gap
    return lro.galore_plus(lr, heads=parts, **options)


def gwt(
    config: Resolved, lr: optax.Schedule, **side: Any
) -> optax.GradientTransformation:
    """Wavelets have levels in place of a rank."""
    options = low_rank(config) | side
    del options["rank"]
    return lro.gwt(lr, config.level, **options)


FULL = ("adamw", "adamw_8bit")  # project nothing
OPTIMIZERS: dict[str, Factory] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "galore": at_gaps(lro.galore),
    "galore_8bit": encoded(lro.galore_8bit),
    "q_galore": encoded(lro.q_galore),
    "fira": at_gaps(lro.fira),
    "subtrack": at_gaps(lro.subtrack),
    "grass_walk": at_gaps(lro.grass_walk),
    "grass_jump": at_gaps(lro.grass_jump),
    "ldadam": at_every_step(lro.ldadam),
    "online_subspace_descent": at_every_step(lro.online_subspace_descent),
    "apollo": at_gaps(lro.apollo),
    "apollo_mini": at_gaps(lro.apollo_mini),
    "coap": at_gaps(lro.coap),
    "sara": at_gaps(lro.sara),
    "dct_adamw": at_gaps(lro.dct_adamw),
    "natural_galore": at_gaps(lro.natural_galore),
    "galore_plus": galore_plus,
    "frugal": at_gaps(lro.frugal),
    "gwt": gwt,
    "sumo": at_gaps(lro.sumo),
}


def learning_rate(config: Resolved) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_lr` of the peak."""
    peak, steps, warmup = config.lr, config.steps, config.warmup
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak * config.final_lr,
    )


def build_optimizer(
    config: Resolved, param_shardings: Any = None
) -> optax.GradientTransformation:
    """The named optimizer, without clipping and guard.

    `--side auto` chooses by `param_shardings`; without them it is the short side. Under
    them the layers of a stack are projected one after another, as bases are in parts.
    """
    if config.optimizer not in OPTIMIZERS:
        raise UsageError(
            f"unknown optimizer {config.optimizer!r}; known: {', '.join(OPTIMIZERS)}"
        )
    rate = learning_rate(config)
    if config.optimizer in FULL:
        return OPTIMIZERS[config.optimizer](config, rate)
    side = {"side": config.side} if config.side else {}
    return OPTIMIZERS[config.optimizer](
        config, rate, param_shardings=param_shardings, **side
    )


def sides(optimizer: optax.GradientTransformation, params: Any) -> dict[str, str]:
    """On which side of each projected matrix its basis lies."""
    rows = lro.selection_report(optimizer, params).rows
    return {row.path: row.matrix.side for row in rows if row.matrix}


def guarded(
    config: Resolved, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Clips, and leaves out the steps whose gradient is not finite.

    The guard itself never gives in: the trainer stops after too many in a row.
    """
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.apply_if_finite(optax.chain(*parts, optimizer), _NEVER)


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(optimizer: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the state that the optimizer makes for params; nothing is allocated."""
    return tree_bytes(jax.eval_shape(optimizer.init, params))
