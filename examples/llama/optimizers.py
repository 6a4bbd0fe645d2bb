"""`build_optimizer` makes the optimizer that the flags name, from its signature."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.llama.config import Resolved, UsageError
from examples.llama.presets import METHODS, parameters

# Takes the resolved flags, the learning rate, and what else was said of the selection.
Factory = Callable[..., optax.GradientTransformation]
_NEVER = int(jnp.iinfo(jnp.int32).max)


def is_decayed(params: Any) -> Any:
    """True on matrices, False on biases and the gains of norms."""

    def matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        # The vectors of a stack of layers have two axes, so the name decides as well.
        return leaf.ndim > 1 and not re.search("norm|bias", jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(matrix, params)


def low_rank(config: Resolved) -> dict[str, Any]:
    """The flags that every low-rank method takes."""
    return {
        "rank": config.rank,
        "scale": config.scale,
        "b1": config.b1,
        "b2": config.b2,
        "eps": config.eps,
        "weight_decay": config.weight_decay or None,
        "mask": is_decayed if config.weight_decay else None,
        "layer_axis": 0,
        "state_dtype": config.state_dtype,
        "seed": config.seed,
    }


def adamw(
    config: Resolved, lr: optax.Schedule, **_: Any
) -> optax.GradientTransformation:
    decay = {"weight_decay": config.weight_decay, "mask": is_decayed}
    return optax.adamw(lr, config.b1, config.b2, config.eps, **decay)


def sgd(config: Resolved, lr: optax.Schedule, **_: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, is_decayed),
        optax.sgd(lr),
    )


def of_library(name: str) -> Factory:
    """The factory of a method, which is given the flags that its signature names."""
    takes = parameters(name)

    def make(
        config: Resolved, lr: optax.Schedule, **more: Any
    ) -> optax.GradientTransformation:
        options = low_rank(config) | more
        options |= {"update_proj_gap": config.update_proj_gap, "level": config.level}
        if "heads" in takes:  # kernels cut into heads have one basis for all of them
            few = config.key_heads
            heads = {"q": config.heads, "k": few, "v": few}

            def heads_of(path: str) -> int:
                found = re.search(r"/([qkv])/", path)
                return heads[found[1]] if found else 1

            options["heads"] = heads_of
        given = {key: value for key, value in options.items() if key in takes}
        return METHODS[name](lr, **given)

    return make


FULL = tuple(name for name in METHODS if "select" not in parameters(name))
OPTAX = {"adamw": adamw, "sgd": sgd}
OPTIMIZERS: dict[str, Factory] = {
    name: OPTAX[name] if name in OPTAX else of_library(name) for name in METHODS
}


def learning_rate(config: Resolved) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_lr` of the peak."""
    peak, steps, warmup = config.lr, config.steps, config.warmup
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        # Optax refuses a decay that ends with the warm-up.
        decay_steps=max(steps, warmup + 1),
        end_value=peak * config.final_lr,
    )


def build_optimizer(
    config: Resolved, param_shardings: Any = None, select: Any = None
) -> optax.GradientTransformation:
    """The named optimizer, without clipping and guard.

    `select` says what is projected, as the methods take it; None leaves it to them.

    `--side auto` chooses by `param_shardings`; without them it is the short side. Under
    them the layers of a stack are projected one after another, as bases are in parts.
    """
    if config.optimizer not in OPTIMIZERS:
        raise UsageError(
            f"unknown optimizer {config.optimizer!r}; known: {', '.join(OPTIMIZERS)}"
        )
    rate = learning_rate(config)
    more: dict[str, Any] = {"side": config.side} if config.side else {}
    if select is not None:  # a matrix that was asked for and is small keeps its columns
        more |= {"select": select, "clip_rank": True}
    optimizer = OPTIMIZERS[config.optimizer](
        config, rate, param_shardings=param_shardings, **more
    )
    if config.weights == "split":
        return lro.split_weights(optimizer, correction_of)
    return optimizer


def correction_of(path: str, leaf: Any) -> str:
    """16 bits for the gains of norms, stacked ones too: they are few, and near 1."""
    return "int16" if "norm" in path else "int8"


def projects(optimizer: optax.GradientTransformation, params: Any) -> bool:
    """Whether any matrix is projected."""
    try:
        return bool(lro.selection_report(optimizer, params).projected)
    except ValueError:  # no bracket
        return False


def check_projects(
    config: Resolved, optimizer: optax.GradientTransformation, params: Any
) -> None:
    """Raises if the named method would be its inner optimizer alone, under its name."""
    try:
        report = lro.selection_report(optimizer, params)
    except ValueError:  # no bracket, as the name says
        return
    if not report.projected:
        raise UsageError(
            f"--optimizer {config.optimizer} projects no matrix of {config.preset}, so "
            "it would train with its inner optimizer alone. Lower --rank, or say "
            f"--optimizer adamw. The decisions:\n{report}"
        )


def sides(optimizer: optax.GradientTransformation, params: Any) -> dict[str, str]:
    """On which side of each projected matrix its basis lies."""
    rows = lro.selection_report(optimizer, params).rows
    return {row.path: row.matrix.side for row in rows if row.matrix}


def guarded(
    config: Resolved,
    optimizer: optax.GradientTransformation,
    estimate: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Clips, and leaves out the steps whose gradient is not finite.

    The guard itself never gives in: the trainer stops after too many in a row. An
    `estimate` takes the place of the gradient before all that.
    """
    parts = [] if estimate is None else [estimate]
    parts += [optax.clip_by_global_norm(config.clip)] if config.clip else []
    guard = optax.apply_if_finite(optax.chain(*parts, optimizer), _NEVER)
    return _in_float32(guard) if config.weights == "split" else guard


def _in_float32(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same for gradients of any float type.

    The guard has one type for the updates of a good step, which are float32 where
    weights are split, and for the zeros of a bad one, which have the gradient's.
    """

    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays, or shapes, in a tree."""
    return lro.bytes_per_device(tree)


def state_bytes(optimizer: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the state that the optimizer makes for params; nothing is allocated."""
    return tree_bytes(jax.eval_shape(optimizer.init, params))
