"""`make_task` makes what the trainer trains: `Instructions` or `Classification`."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.encoder import model as encoder
from examples.finetune import instructions, labelled, metrics
from examples.finetune.chat import conversation, load_chat
from examples.finetune.config import FinetuneConfig, Tuning, check, settled
from examples.finetune.estimates import estimate_gradient
from examples.finetune.examples import Examples
from examples.finetune.export import check_free, export
from examples.finetune.files import Row, fingerprint, read_rows, split
from examples.finetune.generate import Answers
from examples.finetune.models import Model, Pretrained, load_pretrained
from examples.llama import model as llama
from examples.llama.batches import Batch
from examples.llama.config import UsageError
from examples.llama.corpus import Counts
from examples.llama.model import Params, Wrap
from examples.llama.report import Evaluation, entropy, evaluate
from examples.llama.step import Losses, row_sums, token_losses

Measure = Callable[[Batch], Any]


class _Task:
    """What both tasks have: a pretrained model, and rows that are in memory."""

    unit: str
    loss_unit: str
    config: Tuning
    prepared: Model
    measure: Callable[..., Any] | None = None
    data_rows: dict[str, list[Row]]
    examples: dict[str, Examples]
    counts: dict[str, Counts]

    def __init__(self, config: FinetuneConfig):
        if config.export:
            check_free(config.export)
            if jax.process_count() > 1:
                raise UsageError(
                    "--export gathers the model in one process; leave it out"
                )
        self.pretrained = load_pretrained(config.model)
        self.chat = load_chat(self.pretrained.folder)
        name = f"{self.pretrained.folder.resolve().name}-{config.task}"
        config = dataclasses.replace(config, preset=name)
        self.config = settled(config, self.pretrained.config)
        self.read_data()
        rows = len(self.examples["train"])
        self.config = settled(config, self.pretrained.config, rows)
        self.prepared = self.prepare()

    @property
    def losses(self) -> Losses:
        raise NotImplementedError

    def read_data(self) -> None:
        """Fills `data_rows`, `examples` and `counts`."""
        raise NotImplementedError

    def prepare(self) -> Model:
        raise NotImplementedError

    def held_out(self, rows: Sequence[Row], name: Callable[[Row], str]) -> None:
        """Splits the rows; `--val-data` has the validation's, if given."""
        config = self.config
        parts = split(rows, name)
        if config.val_data:
            parts["train"] += parts["dev"]
            parts["dev"] = read_rows(config.val_data, "--val-data")
        for part in ("train", "dev"):
            if not parts[part]:
                what = "train" if part == "train" else "validate"
                raise UsageError(
                    f"{config.data} has no rows to {what} on ({len(rows)} in all); a "
                    "field split of a row says train, dev or test, and --val-data "
                    "names another file"
                )
        self.data_rows = parts

    def dtypes(self) -> dict[str, str]:
        config = self.config
        return {
            "param_dtype": config.param_dtype,
            "compute_dtype": config.compute_dtype,
        }

    @property
    def model(self) -> Any:
        return self.prepared.config

    @property
    def definition(self) -> Any:
        return self.prepared.definition

    @property
    def params(self) -> Params:
        return self.prepared.trained

    @property
    def frozen(self) -> Params:
        return self.prepared.frozen

    @property
    def activations(self) -> Mapping[str, Wrap | None]:
        kind = encoder if self.pretrained.encoder else llama
        return kind.ACTIVATIONS

    @property
    def select(self) -> Any:
        return self.prepared.parts.select()

    @property
    def estimate(self) -> optax.GradientTransformation | None:
        config = self.config
        if config.gradient == "backward":
            return None
        return estimate_gradient(
            config.gradient, config.gradient_rank, config.gradient_eps, config.seed
        )

    def baseline(self) -> tuple[str, float] | None:
        return None

    def read(self, run_dir: pathlib.Path) -> None:
        del run_dir  # all was read for the length of the schedule

    def about(self) -> str:
        told = "; ".join(f"{part}: {self.counts[part]}" for part in self.counts)
        return f"{self.config.data} ({told})"

    def identity(self) -> dict[str, Any]:
        names = (
            "task embeddings head layers select adapter lora_rank lora_alpha "
            "lora_targets gradient gradient_rank pooling"
        )
        flags = {name: getattr(self.config, name) for name in names.split()}
        return flags | {
            "data_hash": fingerprint([r for p in self.data_rows.values() for r in p]),
            "model_hash": self.pretrained.fingerprint(),
            "model": (
                dataclasses.asdict(self.model)
                if self.pretrained.encoder
                else self.model.to_json()
            ),
        }

    def start(self, params: Any, frozen: Any) -> tuple[Params, Params]:
        own, rest = self.prepared.arrays()
        return jax.device_put(own, params), jax.device_put(rest, frozen)

    def frozen_at(self, places: Any) -> Params:
        return jax.device_put(self.prepared.arrays()[1], places)

    def leave(self, run_dir: pathlib.Path) -> None:
        del run_dir

    def rows(self, training: bool) -> Examples:
        part = self.examples["train" if training else "dev"]
        return dataclasses.replace(part, seed=self.config.seed) if training else part

    def scores(
        self, part: str, run: Measure, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """The evaluation over the rows of a part."""
        raise NotImplementedError

    def evaluate(
        self, run: Measure, should_stop: Callable[[], bool]
    ) -> Evaluation | None:
        return self.scores("dev", run, should_stop)

    def closing(self, result: Evaluation, trainer: Any) -> list[tuple[str, str]]:
        rows = [("validation", result.brief)]
        if len(self.examples["test"]):
            test = self.scores("test", trainer.measure)
            assert test is not None
            rows.append(("test", test.brief))
            line = {k.replace("val_", "test_"): v for k, v in test.line().items()}
            trainer.metrics.add({"step": trainer.step} | line)
        if self.config.export:
            rows.append(("export", export(self, trainer)))
        return rows

    def whole(self, trainer: Any) -> Params:
        """All parameters as they are after training, adapters among them."""
        own = trainer.weights.load(trainer.params)
        return self.prepared.joined(own, trainer.frozen)


@dataclasses.dataclass(frozen=True)
class Learned(Evaluation):
    """Mean loss per token of held-out answers."""

    @property
    def brief(self) -> str:
        return f"loss {self.loss:.4f} nats over {self.tokens:,} tokens of answers"


class Instructions(_Task):
    """The answers of conversations."""

    unit, loss_unit = "tokens", "nats per token"

    @property
    def losses(self) -> Losses:
        return token_losses

    def read_data(self) -> None:
        config = self.config
        if self.pretrained.encoder:
            raise UsageError(
                f"--task sft needs a model that writes; {config.model} is an encoder: "
                "--task classify"
            )

        def name(row: Row) -> str:
            try:
                return conversation(row)[0]["content"]
            except ValueError:
                return json.dumps(row)  # refused with its number when it is read

        self.held_out(read_rows(config.data), name)
        self.examples, self.counts = {}, {}
        for part, rows in self.data_rows.items():
            found: list[instructions.Example] = []
            if rows:
                found, self.counts[part] = instructions.read_instructions(
                    rows,
                    self.chat,
                    self.pretrained.tokenizer,
                    config.seq_len,
                    f"{config.data} ({part})",
                )
            lines = [[example] for example in found]
            if config.packing == "packed":
                lines = instructions.packed(found, config.seq_len)

            def as_batch(rows: Sequence[Any], size: int) -> Batch:
                return instructions.as_batch(rows, size, self.config.seq_len)

            self.examples[part] = Examples(config.data, lines, as_batch)

    def prepare(self) -> Model:
        return Model(self.pretrained, self.config, self.dtypes())

    def scores(
        self, part: str, run: Measure, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        batches = self.examples[part].batches(self.config.eval_batch_size)
        found = evaluate(lambda _, batch: run(batch), {}, batches, should_stop)
        return found and Learned(found.loss, found.tokens)

    def closing(self, result: Evaluation, trainer: Any) -> list[tuple[str, str]]:
        rows = super().closing(result, trainer)
        answers = Answers(
            self.definition,
            self.pretrained.tokenizer,
            self.chat,
            self.pretrained.folder,
        )
        params = self.whole(trainer)
        for row in self.data_rows["dev"][: self.config.answers]:
            turns = conversation(row)
            last = max(
                (i for i, turn in enumerate(turns) if turn["role"] == "assistant"),
                default=len(turns),
            )
            asked = turns[:last]
            said = answers(
                params, asked, self.config.seq_len, self.config.answer_tokens
            )
            question = asked[-1]["content"] if asked else ""
            rows.append((f"asked: {_line(question)}", _line(said)))
        return rows


def _line(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."


@dataclasses.dataclass(frozen=True)
class Judged(Evaluation):
    """What a classifier gets right."""

    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def brief(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())

    def line(self) -> dict[str, Any]:
        found = {f"val_{name}": value for name, value in self.scores.items()}
        return {"val_loss": self.loss, "val_rows": self.tokens} | found


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The loss of labels from pooled positions, linear in them.

    Attributes:
      encoder: whether the model is one; else it is a decoder.
      pooling: mean, first or last, of the positions that hold tokens.
      pooler: whether `first` goes through the encoder's own layer.
      real: labels are numbers, and the loss is their squared error.
    """

    encoder: bool
    pooling: str
    pooler: bool
    real: bool

    def logits(
        self, definition: Any, params: Params, batch: Any, wrap_layer: Any = None
    ) -> jax.Array:
        options = {} if wrap_layer is None else {"wrap_layer": wrap_layer}
        head = params["classifier"]
        body = {name: part for name, part in params.items() if name != "classifier"}
        model, real = nnx.merge(definition, body), batch["real"]
        if self.encoder:
            hidden = model(batch["tokens"], real, batch["types"], **options)
        else:
            hidden = model.hidden(batch["tokens"], segments=real, **options)
        hidden = self.pooled(model, hidden, real).astype(jnp.float32)
        # In float32, like a language model's logits.
        logits = hidden @ head["kernel"].astype(jnp.float32)
        return logits + head["bias"].astype(jnp.float32) if "bias" in head else logits

    def pooled(self, model: Any, hidden: jax.Array, real: jax.Array) -> jax.Array:
        if self.pooling == "first":
            return model.pooled(hidden) if self.pooler else hidden[:, 0]
        if self.pooling == "last":
            last = jnp.maximum(jnp.sum(real, axis=1) - 1, 0)
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        weight = real.astype(jnp.float32)[..., None]
        total = jnp.sum(hidden.astype(jnp.float32) * weight, axis=1)
        return total / jnp.maximum(jnp.sum(weight, axis=1), 1)

    def of_logits(self, logits: jax.Array, batch: Any) -> jax.Array:
        """Loss of every row `[B, 1]`, 0 where masked."""
        labels = batch["labels"]
        if self.real:
            return (logits - labels) ** 2 * batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels[:, 0].astype(jnp.int32)
        )
        return losses[:, None] * batch["mask"]

    def losses(
        self, definition: Any, params: Params, batch: Any, wrap_layer: Any = None
    ) -> jax.Array:
        logits = self.logits(definition, params, batch, wrap_layer)
        return self.of_logits(logits, batch)

    def measure(self, definition: Any, params: Params, batch: Any) -> Any:
        """Sums and counts as `row_sums`, and the logits."""
        logits = self.logits(definition, params, batch)
        return *row_sums(self.of_logits(logits, batch), batch), logits


class Classification(_Task):
    """Labels of texts."""

    unit = "rows"

    def baseline(self) -> tuple[str, float]:
        labels = np.asarray([row.label for row in self.examples["dev"].items])
        if self.columns.real:
            return "variance of the validation's numbers", float(labels.var())
        return "entropy of the validation's labels", entropy(labels)

    @property
    def losses(self) -> Losses:
        return self.classifier.losses

    def read_data(self) -> None:
        config, rows = self.config, read_rows(self.config.data)
        columns = labelled.find_columns(
            rows[0], config.text_key, config.label_key, config.data
        )
        self.columns = columns
        self.loss_unit = "squared error" if columns.real else "nats per row"
        self.held_out(rows, columns.text)
        train = self.data_rows["train"]
        self.classes: list[str] = []
        if not columns.real:
            self.classes = labelled.find_classes(train, columns, config.data)
        self.examples, self.counts = {}, {}
        for part, own in self.data_rows.items():
            found: list[labelled.Labelled] = []
            if own:
                found, self.counts[part] = labelled.read_labelled(
                    own,
                    columns,
                    self.classes,
                    self.pretrained.tokenizer,
                    config.seq_len,
                    f"{config.data} ({part})",
                )

            def as_batch(rows: Sequence[Any], size: int) -> Batch:
                return labelled.as_batch(rows, size, self.config.seq_len)

            self.examples[part] = Examples(config.data, found, as_batch)

    def prepare(self) -> Model:
        model, encoder = self.pretrained.config, self.pretrained.encoder
        pooling = self.config.pooling or ("mean" if encoder else "last")
        if (pooling == "last") == encoder:
            raise UsageError(
                f"--pooling {pooling}: {self.config.model} is "
                f"{'an encoder: mean or first' if encoder else 'a decoder: last'}"
            )
        if encoder:
            self._drop_heads(keep_pooler=pooling == "first")
            model = self.pretrained.config
        pooler = encoder and model.pooler
        self.classifier = Classifier(encoder, pooling, pooler, self.columns.real)
        self.measure = self.classifier.measure
        outputs = 1 if self.columns.real else len(self.classes)
        # As transformers draws a new head: small numbers, and no bias for a decoder.
        draw = np.random.default_rng(self.config.seed)
        kernel = draw.normal(0, 0.02, (model.width, outputs)).astype(np.float32)
        head = {"kernel": kernel.astype(jnp.dtype(self.config.param_dtype))}
        if encoder:
            head["bias"] = np.zeros(outputs, head["kernel"].dtype)
        return Model(self.pretrained, self.config, self.dtypes(), {"classifier": head})

    def _drop_heads(self, keep_pooler: bool) -> None:
        """What a classifier does not read leaves the model."""
        model = self.pretrained.config
        pooler = model.pooler and keep_pooler
        self.pretrained.config = dataclasses.replace(model, mlm=False, pooler=pooler)
        gone = {"mlm"} if pooler else {"mlm", "pooler"}
        self.pretrained.params = {
            k: v for k, v in self.pretrained.params.items() if k not in gone
        }

    def scores(
        self, part: str, run: Measure, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        loss, count, logits, labels = 0.0, 0.0, [], []
        for batch in self.examples[part].batches(self.config.eval_batch_size):
            if should_stop():
                return None
            sums, counts, found = map(np.asarray, run(batch))
            rows = int(batch["mask"].sum())
            loss, count = loss + float(sums.sum()), count + float(counts.sum())
            logits.append(found[:rows])
            labels.append(batch["labels"][:rows, 0])
        found, known = np.concatenate(logits), np.concatenate(labels)
        if self.columns.real:
            scores = {"pearson": metrics.pearson(known, found[:, 0])}
        else:
            table = metrics.confusion(known, found.argmax(axis=1), len(self.classes))
            scores = {
                "accuracy": metrics.accuracy(table),
                "f1": metrics.f1(table),
                "matthews": metrics.matthews(table),
            }
        return Judged(loss / max(count, 1), int(count), scores=scores)


def make_task(config: FinetuneConfig) -> _Task:
    """The task that the flags name."""
    check(config)
    kinds = {"sft": Instructions, "classify": Classification}
    return kinds[config.task](config)


__all__ = ["Classification", "Instructions", "Pretrained", "make_task"]
