"""`resolve` fills the flags that were left out, and checks those that were given."""

import dataclasses
from typing import Any, TypeVar

from examples.llama.flags import TrainConfig
from examples.llama.model import ACTIVATIONS, ModelConfig
from examples.llama.presets import (
    METHODS,
    NO_SIDE,
    PRESETS,
    RATES,
    Recipe,
    method_defaults,
)


class UsageError(Exception):
    """Something the caller can mend; the program prints one line and exits with 2."""


@dataclasses.dataclass(frozen=True)
class Resolved(TrainConfig):
    """The same with nothing left out."""

    tokenizer: str = ""
    packing: str = ""
    param_dtype: str = ""
    state_dtype: str = ""
    compute_dtype: str = ""
    seq_len: int = 0
    batch_size: int = 0
    micro_batches: int = 0
    steps: int = 0
    warmup: int = 0
    lr: float = 0.0
    b1: float = 0.0
    b2: float = 0.0
    clip: float = 0.0
    rank: int = 0
    update_proj_gap: int = 0
    scale: float = 0.0
    eval_every: int = 0
    eval_tokens: int = 0
    eval_batch_size: int = 0
    checkpoint_every: int = 0
    # Of the model's attention: kernels of methods that know of heads, and meshes.
    heads: int = 0
    key_heads: int = 0


Kind = TypeVar("Kind", bound=Resolved)
SIDES = ("short", "long", "left", "right", "auto")
LOGS = ("tensorboard", "wandb")
WEIGHTS = ("plain", "stochastic-bf16", "int8", "split")  # of `lro.weight_storage`
STATE_MEMORY = ("device", "pinned_host")
AS_STORED = ("plain", "split")  # a step reads them as they are

# Methods that read no whole gradient between refreshes; dct_adamw has one at every
# step unless told otherwise.
SENDS = (
    "galore galore_8bit galore_adafactor q_galore coap sara natural_galore galore_plus"
).split()

# A checkpoint written under another value of these does not fit; the rest (learning
# rate, length, evaluation, logging) may change between a run and its continuation.
IDENTITY = (
    "preset optimizer packing seq_len batch_size seed param_dtype state_dtype "
    "compute_dtype weights tokenizer rank level update_proj_gap b1 b2"
).split()


MOST = 2**31 - 1  # what the counters of a run and of an optimizer hold
_REAL = 3.4e38  # the largest real number of float32

# The numbers that a flag may be: from, up to (both included), and why not others.
RANGES: dict[str, tuple[float, float, str]] = {
    "seq_len": (2, 2**20, "a row has an input and a target"),
    "batch_size": (1, 2**20, "rows of one step"),
    "micro_batches": (1, 2**20, "parts of a batch"),
    "steps": (1, MOST, "counters have 32 bits"),
    "stop_step": (1, MOST, "a step of the run"),
    "warmup": (0, MOST, "a number of steps"),
    "lr": (1e-37, _REAL, "a step must go somewhere"),
    "final_lr": (0, 1, "a fraction of --lr"),
    "b1": (0, 1 - 1e-7, "a mean over past steps forgets: less than 1"),
    "b2": (0, 1 - 1e-7, "a mean over past steps forgets: less than 1"),
    "eps": (0, 1, "it is added to a root, to keep it from zero"),
    "weight_decay": (0, _REAL, "a negative decay would make weights grow"),
    "clip": (0, _REAL, "a norm; 0 for no clipping"),
    "rank": (1, 2**20, "columns of a basis"),
    "level": (1, 30, "each level halves the width"),
    "update_proj_gap": (1, MOST, "counters have 32 bits"),
    "scale": (1e-37, _REAL, "a step must go somewhere, and downhill"),
    "max_skips": (1, MOST, "a number of steps"),
    "activation_error": (0, _REAL, "a bound; 0 for any error"),
    "replan_every": (0, MOST, "a number of steps; 0 for never"),
    "seed": (0, 2**32 - 1, "keys are made of 32 bits"),
    "eval_every": (0, MOST, "a number of steps; 0 for only at the end"),
    "eval_tokens": (1, 2**40, "a number of tokens"),
    "eval_batch_size": (1, 2**20, "rows of a batch"),
    "checkpoint_every": (0, MOST, "a number of steps; 0 for only at the end"),
    "keep": (1, MOST, "a run without a checkpoint cannot go on"),
}


def resolve(
    config: TrainConfig, model: ModelConfig | None = None
) -> tuple[Resolved, ModelConfig]:
    """Fills what was left out from the preset and checks what was given.

    `model` is another one than the preset's.
    """
    if config.preset not in PRESETS:
        raise UsageError(
            f"unknown preset {config.preset!r}; known: {', '.join(PRESETS)}"
        )
    preset = PRESETS[config.preset]
    model = model or preset.model
    resolved = complete(config, preset.recipe, model)
    model = dataclasses.replace(
        model,
        param_dtype=resolved.param_dtype,
        compute_dtype=resolved.compute_dtype,
        max_length=max(model.max_length, resolved.seq_len),
    )
    return resolved, model


def complete(
    config: TrainConfig, recipe: Recipe, model: Any, kind: type[Kind] = Resolved
) -> Kind:
    """Fills what was left out from the recipe for a model, and checks what was given.

    `kind` has the fields of `config` and those of `Resolved`.
    """
    defaults: dict[str, Any] = dataclasses.asdict(recipe)
    dtype = defaults.pop("dtype")
    defaults |= {"param_dtype": dtype, "compute_dtype": dtype}
    known = config.optimizer in METHODS  # the optimizer itself is refused later
    defaults |= method_defaults(config.optimizer if known else "galore")
    defaults["lr"] *= RATES.get(config.optimizer, 1.0)
    given = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    # The later wins: the preset, the method's own defaults, the flags.
    values = defaults | given
    values.setdefault("warmup", values["steps"] // 10)
    if values.get("weights") == "split":
        _check_split(config)
        # The model reads bfloat16, the optimizer sees float32.
        values["param_dtype"] = "bfloat16"
        values.setdefault("state_dtype", "float32")
    values.setdefault("state_dtype", values["param_dtype"])
    heads = model.heads
    resolved = kind(**values, heads=heads, key_heads=getattr(model, "key_heads", heads))
    _check(resolved, model)
    return resolved


def _check(config: Resolved, model: Any) -> None:
    choices = {
        "corpus": ("stdlib",),
        "tokenizer": ("bytes", "bpe"),
        "packing": ("padded", "packed"),
        "param_dtype": ("float32", "bfloat16"),
        "state_dtype": ("float32", "bfloat16"),
        "compute_dtype": ("float32", "bfloat16"),
        "state_memory": STATE_MEMORY,
        "weights": WEIGHTS,
        "activation_policy": tuple(ACTIVATIONS),
        "side": ("", *SIDES),
    }
    for name, allowed in choices.items():
        if (value := getattr(config, name)) not in allowed:
            raise UsageError(
                f"--{name.replace('_', '-')} must be one of "
                f"{', '.join(filter(None, allowed))}; "
                f"got {value!r}"
            )
    if unknown := {*config.log_to} - {*LOGS}:
        raise UsageError(f"--log-to knows {' and '.join(LOGS)}; got {min(unknown)!r}")
    if config.side and config.optimizer in NO_SIDE:
        raise UsageError(
            f"--side: {config.optimizer} projects on no side; leave it out"
        )
    if config.activation_budget and config.activation_policy not in ("none", "adacc"):
        raise UsageError(
            "--activation-budget plans compressed activations (adacc); leave out "
            f"--activation-policy {config.activation_policy}, or the budget"
        )
    _check_layerwise(config)
    for name, (low, high, why) in RANGES.items():
        value = getattr(config, name)
        # Written so that NaN, which is in no order, is refused as well.
        if value is not None and not low <= value <= high:
            raise UsageError(
                f"--{name.replace('_', '-')} must be from {low:.9g} to {high:.10g} "
                f"({why}); got {value}"
            )
    rows, parts = config.batch_size, config.micro_batches
    if rows % parts:
        raise UsageError(
            f"--batch-size {rows} cannot be cut into {parts} equal --micro-batches"
        )
    if model.vocab_size < 257 and config.tokenizer == "bytes":
        raise UsageError(f"preset {config.preset} has no room for the 256 bytes")


def _check_split(config: TrainConfig) -> None:
    """Raises where parameters and corrections cannot have what is asked."""
    if config.param_dtype not in (None, "bfloat16"):
        raise UsageError(
            "--weights split keeps parameters in bfloat16, with what they lack to "
            f"float32 beside them; leave --param-dtype {config.param_dtype} out"
        )
    if config.compressed:
        raise UsageError(
            "--compressed sends projections of gradients past what --weights split "
            "puts around the optimizer; give one of the two"
        )


def _check_layerwise(config: Resolved) -> None:
    """Raises where the step of one layer after another cannot have what is asked."""
    if not config.layerwise:
        return
    if config.weights not in AS_STORED:
        raise UsageError(
            f"--layerwise updates parameters as they are stored, and --weights "
            f"{config.weights} turns all of them into others around the step; take "
            "--weights split, or plain with --param-dtype bfloat16 for smaller ones"
        )
    if config.activation_budget:
        raise UsageError(
            "--layerwise computes each layer again in its backward pass, so layers "
            "keep nothing that --activation-budget could plan; leave the budget out "
            "(--activation-policy says what the one layer that goes backward keeps)"
        )
    if config.compressed:
        raise UsageError(
            "--layerwise updates a layer before the next one's gradient is known, and "
            "--compressed sends all projections after the backward pass; give one of "
            "the two"
        )
