"""`TrainConfig` holds the command line's flags, a class for each group of `--help`.

What stands under a flag is its text there; `command_line.py` prints it, with the value
that the flag has when it is left out. Where no recipe knows that value, the words
behind "; left out:" or "; empty:" say it. Stories are told in README.md.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Run:
    """How long, how much at once, and what is reported."""

    steps: int | None = None
    """length of the run and its learning-rate schedule, optimizer steps"""
    stop_step: int | None = None
    """save and stop after this step; the schedule still spans --steps; left out:
    none"""
    batch_size: int | None = None
    """rows per optimizer step, all micro-batches together"""
    seed: int = 0
    """seed of the parameters, the data order and the optimizer"""
    eval_every: int | None = None
    """steps between two validations; 0: only at the end"""
    eval_tokens: int | None = None
    """predicted tokens in a validation, from the start of its text"""
    eval_batch_size: int | None = None
    """rows per validation batch; the perplexity does not depend on it"""
    galore_compat: bool = False
    """report also the loss as GaLore's script does"""
    log_to: tuple[str, ...] = ()
    """tensorboard or wandb (offline, unless WANDB_MODE says otherwise); empty:
    neither"""
    compilation_cache: str = ""
    """folder of compiled programs, for runs that go on; empty: none, or that of
    JAX_COMPILATION_CACHE_DIR"""


@dataclasses.dataclass(frozen=True)
class Data:
    """The text, and how it is cut into rows."""

    corpus: str = "stdlib"
    """sources of Python's standard library, without --data"""
    data: str = ""
    """glob (** allowed) of .txt, .jsonl, C4 .json.gz shards; empty: --corpus"""
    val_data: str = ""
    """validation text, a glob; empty: a twentieth of the documents of --data"""
    text_key: str = "text"
    """name of the field that holds the text in JSON lines"""
    tokenizer: str | None = None
    """bytes, or bpe: trained at first use and kept in --cache-dir"""
    packing: str | None = None
    """padded: a document, a row, cut to --seq-len; packed: end to end"""
    seq_len: int | None = None
    """length of a row, tokens"""
    cache_dir: str = "runs/cache"
    """of trained tokenizers, and hashes of shards that were read"""


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained."""

    preset: str = "tiny"
    """model and recipe: tiny, 9m, 20m, 35m, 40m, 60m, 71m, 100m, 130m, 250m, 350m, 1b,
    3b, 7b or 13b"""
    init_from: str = ""
    """folder of a pretrained decoder, as transformers saves one; its weights, shape and
    tokenizer are taken, and the recipe of --preset; empty: random"""
    param_dtype: str | None = None
    """of parameters in a step, and gradients: float32 or bfloat16"""
    compute_dtype: str | None = None
    """of activations and matrix products: float32 or bfloat16"""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The method and its numbers."""

    optimizer: str = "even_muon"
    """name of a method; --optimizer list prints all, a line each"""
    lr: float | None = None
    """peak learning rate, per step: GaLore's, times the method's factor"""
    warmup: int | None = None
    """steps of its linear rise from 0, a tenth of --steps"""
    final_lr: float = 0.1
    """learning rate at the end of the cosine, as a fraction of the peak"""
    b1: float | None = None
    """decay of the first moment, per step"""
    b2: float | None = None
    """decay of the second moment, per step"""
    eps: float = 1e-8
    """added to the root of the second moment, same unit as a gradient"""
    weight_decay: float = 0.0
    """decoupled decay of matrices, per step and unit of learning rate"""
    clip: float | None = None
    """largest global norm of the gradient; 0: no clipping"""
    max_skips: int = 10
    """stop when so many steps in a row had a gradient that was not finite"""
    rank: int | None = None
    """of the projection, columns"""
    update_proj_gap: int | None = None
    """steps between two refreshes of the projection (in q_galore: at first; ldadam and
    online_subspace_descent move the basis at every step)"""
    scale: float | None = None
    """factor on the update of projected matrices"""
    side: str = ""
    """of a matrix, on which its basis lies: short, long (smaller state), left, right or
    auto (what --mesh does not cut, else short); empty: the method's own"""
    level: int = 2
    """of gwt and foam; each level halves the moments"""
    state_dtype: str | None = None
    """of moments and bases: float32 or bfloat16; as --param-dtype"""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is kept, and in how many bits."""

    micro_batches: int | None = None
    """parts that the rows of one step are computed in, one after another"""
    layerwise: bool = False
    """update each layer inside the backward pass, so that one layer's gradient is alive
    at a time; losses stay, a second backward pass is added"""
    weights: str = "plain"
    """parameters between steps: plain (in --param-dtype), stochastic-bf16 (rounded at
    random), int8 (the layers' matrices as 8-bit codes, rounded at random) or split
    (bfloat16, and what it lacks to float32 in a byte of the state)"""
    state_memory: str = "device"
    """where the optimizer's state lies between steps: device, or pinned_host, the
    host's memory, from which every step takes it and brings it back"""
    activation_policy: str = "none"
    """what a layer keeps for its backward pass: none (no policy: all), full (its input;
    the rest is recomputed), names (what matrix products made) or adacc (the same in 4
    and 8 bits; gradients differ slightly)"""
    activation_budget: str = ""
    """for what layers keep, such as 30% or bytes: a plan says what is kept, compressed
    or recomputed (adacc); empty: no plan"""
    activation_error: float = 0.05
    """bound on its error, measured on the first batch; 0: any"""
    replan_every: int = 500
    """steps between two looks at errors and faster plans; 0: never"""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where it runs."""

    mesh: str = ""
    """sizes of data (whole copies), fsdp (parameters and state cut) and tensor
    (products cut), such as data=2,fsdp=4; -1: all that is left; empty: fsdp=-1, or one
    device where rows cannot be cut"""
    compressed: bool = False
    """send projections of gradients over the data axis of --mesh between refreshes; for
    galore and its kin, coap and sara; --clip goes by the norm of what is sent"""
    distributed: bool = False
    """join the other processes of a TPU pod, Slurm or GKE; elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """What a run leaves, and how one goes on."""

    run_dir: str = ""
    """folder of the run; empty: runs/PRESET-OPTIMIZER, numbered when taken"""
    checkpoint_every: int | None = None
    """steps between two checkpoints; 0: only at the end"""
    keep: int = 3
    """newest checkpoints kept, damaged ones among them while there are few"""
    resume: bool = False
    """go on from the newest good checkpoint, or start; with another --mesh, --layerwise
    or --compressed, too"""
    verify: bool = False
    """only compare the checkpoints of --run-dir with their records"""


@dataclasses.dataclass(frozen=True)
class TrainConfig(Run, Data, Model, Optimizer, Memory, Devices, Checkpoints):
    """Train a LLaMA on real text with a low-rank optimizer.

    In brackets: a flag's value when it is left out, here with --preset {preset} and
    --optimizer {optimizer}; give others beside --help for theirs. --no-FLAG turns a
    switch off. README.md in examples/llama has commands for one and many devices.
    """
