"""`TrainConfig` holds the command line's flags; `resolve` fills and checks them."""

import dataclasses
from typing import Any, TypeVar

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
class TrainConfig:
    """Train a LLaMA on real text with a low-rank optimizer.

    Flags left out take the value of the preset's recipe; the resolved values are
    written to config.json in the run's folder.
    """

    preset: str = "tiny"
    """model and recipe: tiny, 9m, 20m, 35m, 40m, 60m, 71m, 100m, 130m, 250m, 350m,
    1b, 3b, 7b or 13b"""
    optimizer: str = "galore"
    """name in the registry of examples/llama/optimizers.py: adamw, sgd, adamw_8bit,
    adamw_4bit, galore, galore_8bit, q_galore, fira, subtrack, grass_walk, grass_jump,
    ldadam (without error feedback), apollo, online_subspace_descent, apollo_mini, coap,
    sara, dct_adamw (without error feedback), natural_galore, galore_plus, frugal, gwt,
    sumo, muon, sinkgd or racs"""

    init_from: str = ""
    """folder of a pretrained decoder, as transformers saves one: training goes on from
    its weights, with its tokenizer and its shape; the recipe is that of --preset"""

    corpus: str = "stdlib"
    """stdlib: the sources of Python's standard library; ignored when --data is given"""
    data: str = ""
    """training text: a glob of .txt, .jsonl or C4 .json.gz shards, ** allowed"""
    val_data: str = ""
    """validation text, a glob; empty: every document whose path and line hash to 0
    modulo 20 is held out of --data"""
    text_key: str = "text"
    """name of the field that holds the text in JSON lines"""
    tokenizer: str | None = None
    """bytes, or bpe: trained on the corpus at first use and kept in --cache-dir"""
    packing: str | None = None
    """padded: one document, one row, cut to --seq-len; packed: documents end to end"""
    cache_dir: str = "runs/cache"
    """folder of trained tokenizers, and of the hashes of shards that were read"""

    seq_len: int | None = None
    """length of a row, tokens"""
    batch_size: int | None = None
    """rows per optimizer step, all micro-batches together"""
    micro_batches: int | None = None
    """parts that the rows of one step are computed in, one after another"""

    steps: int | None = None
    """length of the whole run and of its learning-rate schedule, optimizer steps"""
    stop_step: int | None = None
    """save and stop after this step; the schedule still spans --steps"""
    warmup: int | None = None
    """linear warm-up of the learning rate, steps; left out: a tenth of --steps"""
    lr: float | None = None
    """peak learning rate, per step; left out: the preset's, which is GaLore's, times
    the optimizer's factor in presets.py"""
    final_lr: float = 0.1
    """learning rate at the end of the cosine, as a fraction of the peak"""
    b1: float | None = None
    """decay of the first moment, per step; left out: the method's own, mostly 0.9"""
    b2: float | None = None
    """decay of the second moment, per step; left out: the method's own, mostly 0.999"""
    eps: float = 1e-8
    """added to the root of the second moment, same unit as a gradient"""
    weight_decay: float = 0.0
    """decoupled decay of matrices, per step and unit of learning rate"""
    clip: float | None = None
    """largest global norm of the gradient; 0: no clipping"""
    rank: int | None = None
    """rank of the projection (methods that project), columns; left out:
    the preset's, apollo_mini 1"""
    level: int = 2
    """levels of the wavelet transform (gwt); each halves the moments"""
    side: str = ""
    """which side of a matrix its basis lies on (methods that project):
    short, long (smaller state), left, right or auto (the one that --mesh does not cut,
    so that no step projects over the network; else the short one); empty: the method's
    own, short but for natural_galore"""
    update_proj_gap: int | None = None
    """steps between two refreshes of the projection (methods that project;
    at first, in q_galore; the basis of ldadam and online_subspace_descent moves at
    every step); left out: the preset's, or the method's own if that is not galore's:
    coap 32, dct_adamw 1"""
    scale: float | None = None
    """factor on the update inside the subspace of projected matrices (all but adamw,
    adamw_8bit and adamw_4bit); left out: the method's own, 0.25 for galore"""
    max_skips: int = 10
    """stop when this many steps in a row had a gradient that was not finite"""

    param_dtype: str | None = None
    """type of the parameters in a step and of their gradients: float32 or bfloat16"""
    state_dtype: str | None = None
    """type of moments and bases between steps (not of 8-bit ones): float32 or bfloat16;
    left out: as --param-dtype"""
    compute_dtype: str | None = None
    """type of activations and matrix products: float32 or bfloat16"""
    weights: str = "plain"
    """how parameters are stored between steps: plain (in --param-dtype),
    stochastic-bf16 (bfloat16, rounded at random), int8 (the layers' matrices as
    8-bit codes, rounded at random) or split (bfloat16, and what it lacks to float32 in
    a byte of the optimizer's state)"""
    activation_policy: str = "none"
    """what a layer keeps for its backward pass: none (no policy: all that the gradient
    uses), full (its input; the rest is recomputed), names (what matrix products made)
    or adacc (the same in 4 and 8 bits; gradients differ slightly). A run may go on with
    another"""
    activation_budget: str = ""
    """memory for what layers keep: a percentage of what keeping every tagged value
    takes, such as 30%, or bytes in all. A plan decides what is kept, compressed or
    recomputed (adacc); it is written to the run's folder"""
    activation_error: float = 0.05
    """largest bound on the error of the layers' gradient that the plan for
    --activation-budget may cause, as measured on the first batch; 0: any"""
    replan_every: int = 500
    """steps after which errors are measured again and the plan is made anew where it
    breaks --activation-error or another is faster; 0: never"""
    mesh: str = ""
    """how the devices are laid out: sizes of data (whole copies), fsdp (parameters and
    state cut) and tensor (products cut), such as data=2,fsdp=4 or fsdp=-1 for all that
    is left; empty: all on fsdp, if the rows of a micro-batch can be cut over them, else
    one device. A run may go on with another"""
    layerwise: bool = False
    """update each layer inside the backward pass, so that one layer's gradient is alive
    at a time; losses stay the same. Steps whose gradient is not finite are left out as
    ever, also with --clip 0: that, and --clip, cost a second backward pass. A run may
    go on with or without it"""
    compressed: bool = False
    """send projections of gradients over the data axis of --mesh (empty: data=-1)
    between refreshes, of a method that allows it: galore, galore_8bit, q_galore, coap,
    sara, natural_galore, galore_plus. --clip goes by the norm of what is sent. A run
    may go on with or without it"""
    distributed: bool = False
    """join the other processes of a TPU pod, of Slurm or of GKE, as JAX finds them;
    elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"""
    seed: int = 0
    """seed of the parameters, the data order and the optimizer"""

    eval_every: int | None = None
    """steps between two validations; 0: only at the end"""
    eval_tokens: int | None = None
    """predicted tokens in a validation, from the start of the validation text"""
    eval_batch_size: int | None = None
    """rows per validation batch; the perplexity does not depend on it"""
    galore_compat: bool = False
    """report also the loss as GaLore's script computes it: mean of batch means,
    divided by one batch too many"""

    checkpoint_every: int | None = None
    """steps between two checkpoints; 0: only at the end"""
    keep: int = 3
    """newest checkpoints kept, damaged ones among them while there are not so many"""
    resume: bool = False
    """go on from the newest good checkpoint of the run; a run without one starts"""
    run_dir: str = ""
    """folder of the run; empty: runs/PRESET-OPTIMIZER, numbered when taken"""
    verify: bool = False
    """train nothing: compare the checkpoints of --run-dir with their records"""
    log_to: tuple[str, ...] = ()
    """tensorboard or wandb or both (the extra logging): metrics go there as well, into
    the run's folder; wandb stays offline unless WANDB_MODE says otherwise"""
    compilation_cache: str = ""
    """folder of compiled programs, so that a run that goes on need not compile again;
    empty: none, or that of JAX_COMPILATION_CACHE_DIR"""


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
