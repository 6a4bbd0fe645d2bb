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
    """Fine-tune a pretrained model with a low-rank optimizer or with LoRA."""

    task: str = "sft"
    """sft: learn the answers of conversations; classify: learn labels of texts"""
    model: str = ""
    """folder of the model, as transformers saves one: config.json, safetensors and
    tokenizer.json"""
    data: str = ""
    """rows, .jsonl or .tsv: conversations (messages, conversations, or prompt and
    response), or texts with labels (as in GLUE's files). A field split holds rows out
    (dev, test); without one a tenth is, by a hash of its text"""
    val_data: str = ""
    """rows to validate on; empty: those held out of --data"""
    text_key: str = ""
    """classify: fields of the text, or of both texts with a comma; empty: the usual
    ones, such as text, sentence or sentence1,sentence2"""
    label_key: str = ""
    """classify: field of the label; empty: the usual ones, such as label. Of the name
    score it is a number, not a class"""
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
    """lora: two small factors beside every target are trained, the layers are frozen"""
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
    """folder to write the model to at the end, adapters merged, for transformers"""
    final_lr: float = 0.0
    """learning rate at the end of the cosine, as a fraction of the peak"""

    preset: Text = ""
    init_from: Text = ""
    corpus: Text = "stdlib"
    tokenizer: Text = "bpe"
    cache_dir: Text = ""
    eval_tokens: Annotated[int, *Hidden] = 1
    layerwise: Annotated[bool, *Hidden] = False
    compressed: Annotated[bool, *Hidden] = False
    activation_budget: Text = ""
    activation_error: Annotated[float, *Hidden] = 0.05
    replan_every: Annotated[int, *Hidden] = 500
    galore_compat: Annotated[bool, *Hidden] = False


@dataclasses.dataclass(frozen=True)
class Tuning(FinetuneConfig, Resolved):
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
    if not 0 <= config.answers <= 1000:
        raise UsageError(f"--answers must be from 0 to 1000; got {config.answers}")
