"""`Task` is what a `Trainer` trains and on what; `Pretraining` is a LLaMA on text."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.convert import read_model
from examples.llama.batches import Batch, Rows, Source, validation_rows
from examples.llama.config import Resolved, TrainConfig, UsageError, resolve
from examples.llama.corpus import load_corpora
from examples.llama.model import (
    ACTIVATIONS,
    ModelConfig,
    Params,
    Wrap,
    abstract_model,
)
from examples.llama.placement import drawn
from examples.llama.processes import found_by_first, is_first
from examples.llama.report import (
    Evaluation,
    entropy,
    eval_batches,
    evaluate,
    unigram,
)
from examples.llama.run_folder import write_whole
from examples.llama.step import Losses, token_losses
from examples.llama.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    of_folder,
)


class Task(Protocol):
    """A model, its loss and its rows; all else of a run is the trainer's.

    It is made from the flags, and refuses those that do not fit. `params` are the
    shapes of what is trained, `frozen` of what the model has besides.
    """

    @property
    def config(self) -> Resolved: ...

    @property
    def model(self) -> Any: ...

    @property
    def definition(self) -> Any: ...

    @property
    def params(self) -> Params: ...

    @property
    def frozen(self) -> Params: ...

    @property
    def losses(self) -> Losses: ...

    @property
    def measure(self) -> Callable[..., Any] | None:
        """Of a definition, parameters and a batch, by rows; None: the losses' sums."""
        ...

    @property
    def activations(self) -> Mapping[str, Wrap | None]:
        """What a layer keeps for its backward pass, by `--activation-policy`."""
        ...

    @property
    def select(self) -> Any:
        """What is projected, as the methods take it; None leaves it to them."""
        ...

    @property
    def estimate(self) -> optax.GradientTransformation | None:
        """What takes the gradient's place, from `loss_fn`; None: there is one."""
        ...

    @property
    def unit(self) -> str:
        """What the loss is a mean of."""
        ...

    @property
    def loss_unit(self) -> str:
        """Of the loss, such as nats per byte."""
        ...

    def baseline(self) -> tuple[str, float] | None:
        """The validation loss of something simple, and what that is; None: nothing."""
        ...

    def read(self, run_dir: pathlib.Path) -> None:
        """Reads what the run will be over."""
        ...

    def about(self) -> str:
        """The data in a few words."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run, beside flags."""
        ...

    def start(self, params: Any, frozen: Any) -> tuple[Params, Params]:
        """What is trained, as it is at first, and what is not, at these shardings."""
        ...

    def frozen_at(self, places: Any) -> Params:
        """What is not trained, for a run that goes on."""
        ...

    def leave(self, run_dir: pathlib.Path) -> None:
        """Leaves in the run's folder what another program needs beside the weights."""
        ...

    def rows(self, training: bool) -> Source:
        """The rows to train on, in the order of `--seed`."""
        ...

    def evaluate(
        self, run: Callable[[Batch], Any], should_stop: Callable[[], bool]
    ) -> Any:
        """An `Evaluation` by a compiled `measure`; None when told to stop."""
        ...

    def closing(self, result: Any, trainer: Any) -> list[tuple[str, str]]:
        """Rows of the closing table, when the trainer is done."""
        ...


class Pretraining:
    """The next token of a text, from random parameters or from `--init-from`."""

    unit, estimate = "tokens", None

    def __init__(self, config: TrainConfig):
        self.tokenizer: Tokenizer
        self.pretrained: Params | None = None
        model = None
        if config.init_from:
            # The tokenizer first, which costs nothing.
            self.tokenizer = of_folder(config.init_from)
            model, self.pretrained = read_model(config.init_from)
            if not isinstance(model, ModelConfig):
                raise UsageError(
                    f"--init-from {config.init_from} is an encoder; the trainer's "
                    "models are decoders"
                )
        self.config, self.model = resolve(config, model)
        self.definition, self.params = abstract_model(self.model)
        self.frozen: Params = {}
        self.losses: Losses = token_losses
        self.activations: Mapping[str, Wrap | None] = ACTIVATIONS
        self.measure: Callable[..., Any] | None = None
        self.select: Any = None

    def read(self, run_dir: pathlib.Path) -> None:
        """The corpora, their tokenizer and the rows to validate on."""
        config = self.config
        self.train_text, self.val_text = load_corpora(
            config.data, config.val_data, config.text_key
        )
        # As it was at the start: a save says nothing of what was changed since.
        self.corpus_hash = found_by_first(
            lambda: self.train_text.fingerprint(config.cache_dir)
        )
        # A run that goes on keeps the tokenizer that it began with.
        own = run_dir / "tokenizer.json" if config.resume else None
        size = self.model.vocab_size
        if self.pretrained is None:
            self.tokenizer = load_tokenizer(
                config.tokenizer, size, self.train_text, config.cache_dir, own
            )
        # Read once: every validation is over the same rows.
        self.validation = list(validation_rows(self.rows(False), config.eval_tokens))
        if not self.validation:
            raise UsageError(
                f"corpus {self.val_text.name} holds no validation text: give more "
                "files, or --val-data"
            )

    @property
    def symbol(self) -> str:
        """What the model predicts."""
        return "byte" if isinstance(self.tokenizer, ByteTokenizer) else "token"

    @property
    def loss_unit(self) -> str:
        return f"nats per {self.symbol}"

    def baseline(self) -> tuple[str, float]:
        targets = itertools.chain.from_iterable(row[1:] for row in self.validation)
        name = f"entropy of the validation text's {self.symbol} frequencies"
        return name, entropy(targets)

    def rows(self, training: bool) -> Rows:
        config = self.config
        return Rows(
            self.train_text if training else self.val_text,
            self.tokenizer,
            config.seq_len,
            config.packing == "packed",
            config.seed if training else None,
        )

    def about(self) -> str:
        text = self.train_text
        return (
            f"corpus {text.name}: {len(text.paths)} shards, hash {self.corpus_hash} "
            "of all bytes"
        )

    def identity(self) -> dict[str, Any]:
        return {
            "corpus_hash": self.corpus_hash,
            "tokenizer_hash": self.tokenizer.fingerprint,
            "model": self.model.to_json(),
        }

    def start(self, params: Any, frozen: Any) -> tuple[Params, Params]:
        if self.pretrained is None:
            return drawn(self.model, self.config.seed, params), self.frozen_at(frozen)
        dtype = jnp.dtype(self.config.param_dtype)
        own = jax.tree.map(lambda x: np.asarray(x).astype(dtype), self.pretrained)
        self.pretrained = {}  # as large as the model, and of no use from here on
        return jax.device_put(own, params), self.frozen_at(frozen)

    def frozen_at(self, places: Any) -> Params:
        del places
        return {}

    def leave(self, run_dir: pathlib.Path) -> None:
        own = run_dir / "tokenizer.json"
        if isinstance(self.tokenizer, BPETokenizer) and is_first() and not own.exists():
            write_whole(own, self.tokenizer.serialized)

    def evaluate(
        self, run: Callable[[Batch], Any], should_stop: Callable[[], bool]
    ) -> Evaluation | None:
        config = self.config
        batches = eval_batches(self.validation, config.eval_batch_size, config.seq_len)
        found = evaluate(lambda _, batch: run(batch), {}, batches, should_stop)
        return found and dataclasses.replace(found, per=self.symbol)

    def closing(self, result: Evaluation, trainer: Any) -> list[tuple[str, str]]:
        del trainer
        guess = unigram(self.rows(True), self.validation, self.model.vocab_size)
        rows = [
            (
                "validation perplexity",
                f"{result.perplexity:.3f} per {result.per}, over "
                f"{result.tokens:,} of them",
            ),
            (f"{self.symbol}-unigram perplexity", f"{guess:.3f} on the same"),
        ]
        if self.config.galore_compat:
            compat = f"{result.compat_perplexity:.3f}"
            rows.append(("as GaLore's script counts", compat))
        return rows
