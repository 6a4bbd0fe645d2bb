"""`FinetuneConfig` holds the flags of fine-tuning; `settled` fills and checks them."""

import dataclasses
from typing import Annotated, Any

import tyro

from examples.finetune.adapter import TARGETS
from examples.finetune.estimates import METHODS
from examples.llama.config import Resolved, TrainConfig, UsageError, complete
from examples.llama.presets import Recipe

Hidden = (tyro.conf.Fixed, tyro.conf.Suppress)  # flags of pretraining alone
Text = Annotated[str, *Hidden]

HOW = ("full", "projected", "frozen")
CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("sft", "classify"),
    "embeddings": ("", *HOW),
    "head": HOW,
    "layers": ("projected", "frozen"),
    "adapter": ("", "lora"),
    "lora_targets": tuple(TARGETS),
    "gradient": ("backward", *METHODS),
    "pooling": ("", "mean", "first", "last"),
}

_ESTIMATE = ("gradient_rank", "gradient_eps")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a pretrained model with a low-rank optimizer or with LoRA.

    In brackets: a flag's value when it is left out; what goes by the model's width is a
    place to begin a search from. --no-FLAG turns a switch off. The flags below
    "finetune" are the trainer's. The page docs/finetuning.md has whole commands.
    """

    task: str = "sft"
    """sft: learn the answers of conversations; classify: learn labels of texts"""
    model: str = ""
    """folder of the model, as transformers saves one: config.json, safetensors and
    tokenizer.json; empty: required"""
    data: str = ""
    """rows, .jsonl or .tsv: conversations (messages, conversations, or prompt and
    response), or texts with labels (as in GLUE's files). A field split holds rows out
    (dev, test); without one a tenth is, by a hash of its text; empty: required"""
    val_data: str = ""
    """rows to validate on; empty: those held out of --data"""
    text_key: str = ""
    """classify: fields of the text, or of both texts with a comma; empty: the usual
    ones, such as text, sentence or sentence1,sentence2"""
    label_key: str = ""
    """classify: field of the label; one named score is a number, not a class; empty:
    the usual ones, such as label"""
    unlabelled: str = "-1,-"
    """classify: labels that say that there is none, with commas, as in GLUE; empty:
    all are classes, for sets in which -1 is one"""
    optimizer: str = "galore"
    """name of a method; --optimizer list prints all, a line each"""
    epochs: float = 3.0
    """passes over the rows, if --steps is left out"""

    embeddings: str = ""
    """what becomes of the tables of tokens and positions: full (trained as a whole),
    projected (by the optimizer, too) or frozen; empty: full, with --adapter frozen"""
    head: str = "full"
    """the same of the output head or classifier; one that is tied to the embedding goes
    with it"""
    layers: str = "projected"
    """the layers' matrices: projected, as the optimizer chooses, or frozen with all
    that is in the layers (a linear probe)"""
    select: str = ""
    """which of the layers' matrices are projected: all-linear, or words of their paths
    with commas, such as attn or q,v; empty: the optimizer's own choice"""

    adapter: str = ""
    """lora: two small factors beside every target are trained, the layers are frozen;
    empty: none"""
    lora_rank: int = 8
    """columns of the first factor"""
    lora_alpha: float = 16.0
    """the product of the factors counts alpha / rank times"""
    lora_targets: str = "all-linear"
    """all-linear, attention, qv or mlp"""

    gradient: str = "backward"
    """backward: by a backward pass; mezo, subzero, tezo or lozo: estimated from two
    losses, for any --optimizer (sgd in their papers)"""
    gradient_rank: int = 8
    """columns of the subspaces of subzero, tezo and lozo"""
    gradient_eps: float = 1e-3
    """how far the parameters are moved to either side for an estimate"""

    pooling: str = ""
    """classify: mean or first of an encoder's positions (first: through its pooler, if
    it has one), last of a decoder's; empty: mean or last"""
    answers: int = 3
    """sft: held-out prompts that are answered at the end, greedily; 0: none"""
    answer_tokens: int = 48
    """sft: longest answer, tokens"""
    export: str = ""
    """folder to write the model to at the end, adapters merged, for transformers;
    empty: none"""
    final_lr: float = 0.0
    """learning rate at the end of the cosine, as a fraction of the peak"""

    # The trainer's, with what `recipe` below makes of them.
    steps: int | None = None
    """length of the run and its learning-rate schedule, optimizer steps; left out: by
    --epochs"""
    batch_size: int | None = None
    """rows per optimizer step, all micro-batches together; left out: 16, classify 32"""
    eval_every: int | None = None
    """steps between two validations; 0: only at the end; left out: an epoch's"""
    eval_batch_size: int | None = None
    """rows per validation batch; the scores do not depend on it; left out:
    --batch-size, classify 64"""
    packing: str | None = None
    """padded: a document, a row, cut to --seq-len; packed: end to end; left out:
    packed, classify padded"""
    seq_len: int | None = None
    """length of a row, tokens; left out: 512, classify 128, or what the model has"""
    param_dtype: str | None = None
    """of parameters in a step, and gradients: float32 or bfloat16; left out: bfloat16
    where the model has it, else float32"""
    compute_dtype: str | None = None
    """of activations and matrix products: float32 or bfloat16; left out: as for
    --param-dtype"""
    state_dtype: str | None = None
    """of moments and bases: float32 or bfloat16; left out: as --param-dtype"""
    lr: float | None = None
    """peak learning rate, per step; left out: 1 / (3 width), with --adapter four times
    that, times the method's factor"""
    warmup: int | None = None
    """steps of its linear rise from 0; left out: a tenth of --steps"""
    b1: float | None = None
    """decay of the first moment, per step; left out: the method's own, mostly 0.9"""
    b2: float | None = None
    """decay of the second moment, per step; left out: the method's own, mostly 0.999"""
    clip: float | None = None
    """largest global norm of the gradient; 0: no clipping; left out: 1, with --gradient
    other than backward 0"""
    rank: int | None = None
    """of the projection, columns; left out: width / 16, at most 128"""
    update_proj_gap: int | None = None
    """steps between two refreshes of the projection; left out: 100, or the method's own
    where it is not GaLore's"""
    scale: float | None = None
    """factor on the update of projected matrices; left out: the method's own, 0.25 for
    galore"""
    micro_batches: int | None = None
    """parts that the rows of one step are computed in, one after another; left out:
    1"""
    checkpoint_every: int | None = None
    """steps between two checkpoints; 0: only at the end; left out: an epoch's"""
    run_dir: str = ""
    """folder of the run; empty: runs/MODEL-TASK-OPTIMIZER, numbered when taken"""

    preset: Text = ""
    init_from: Text = ""
    corpus: Text = "stdlib"
    tokenizer: Text = "bpe"
    cache_dir: Text = ""
    eval_tokens: Annotated[int, *Hidden] = 1
    compressed: Annotated[bool, *Hidden] = False
    galore_compat: Annotated[bool, *Hidden] = False


@dataclasses.dataclass(frozen=True)
class Tuning(Resolved, FinetuneConfig):
    """The same with nothing left out."""


def recipe(config: FinetuneConfig, model: Any, rows: int) -> Recipe:
    """What a run does unless a flag says otherwise.

    The learning rate goes with 1 / width, so that AdamW has 8e-4 at a width of 128 and
    2e-5 at 4096; with an adapter it is four times as high. That is a place to begin a
    search from, not its result.
    """
    batch = config.batch_size or (32 if config.task == "classify" else 16)
    epoch = max(-(-rows // batch), 1)
    room = model.max_length
    # RoBERTa's table has rows that are no positions.
    padding = getattr(model, "pad_position", None)
    room -= 0 if padding is None else padding + 1
    return Recipe(
        steps=max(round(config.epochs * epoch), 1),
        lr=(4 if config.adapter else 1) / (3 * model.width),
        rank=max(min(128, model.width // 16), 1),
        update_proj_gap=100,
        seq_len=min(128 if config.task == "classify" else 512, room),
        batch_size=batch,
        micro_batches=1,
        # The norm of an estimate grows with the number of parameters.
        clip=1.0 if config.gradient == "backward" else 0.0,
        packing="packed" if config.task == "sft" else "padded",
        dtype="bfloat16" if model.param_dtype == "bfloat16" else "float32",
        eval_every=epoch,
        eval_batch_size=64 if config.task == "classify" else batch,
        checkpoint_every=epoch,
    )


def settled(config: FinetuneConfig, model: Any, rows: int = 1) -> Tuning:
    """Fills what was left out for a model and so many rows, and checks all.

    Raises:
        UsageError: flags that do not fit the model, or each other.
    """
    check(config)
    tuning = complete(config, recipe(config, model, rows), model, Tuning)
    if tuning.seq_len > model.max_length:
        raise UsageError(
            f"--seq-len {tuning.seq_len} is too long: the model has "
            f"{model.max_length} positions"
        )
    return tuning


def check(config: FinetuneConfig) -> None:
    """Raises where a flag has no such value."""
    for name, allowed in CHOICES.items():
        if (value := getattr(config, name)) not in allowed:
            raise UsageError(
                f"--{name.replace('_', '-')} must be one of "
                f"{', '.join(filter(None, allowed))}; got {value!r}"
            )
    for name in ("epochs", "lora_rank", "lora_alpha", "answer_tokens", *_ESTIMATE):
        if not 0 < getattr(config, name) <= 2**20:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} must be above 0; got {getattr(config, name)}")
    if config.adapter and config.layers == "frozen":
        raise UsageError("--adapter trains beside frozen layers; leave out --layers")
    _check_next_token(config)
    if not 0 <= config.answers <= 1000:
        raise UsageError(f"--answers must be from 0 to 1000; got {config.answers}")


def _check_next_token(config: FinetuneConfig) -> None:
    """Raises where steps that are made for pretraining cannot have what is asked."""
    whole = config.task == "sft" and not config.adapter
    whole = whole and config.gradient == "backward"
    if config.activation_budget and not (whole and config.layers != "frozen"):
        raise UsageError(
            "--activation-budget plans for layers that are trained by the loss of the "
            "next token: --task sft without --adapter, --gradient and frozen --layers; "
            "elsewhere give an --activation-policy"
        )
    frozen = "frozen" in (config.embeddings, config.head, config.layers)
    if config.layerwise and (frozen or not whole):
        raise UsageError(
            "--layerwise updates all parts of a model by the loss of the next token: "
            "--task sft without --adapter, --gradient and frozen parts"
        )
