"""`Classification` trains a head, and what is under it, on labels of texts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.finetune import labelled, metrics
from examples.finetune.examples import Examples
from examples.finetune.files import read_rows
from examples.finetune.models import Model
from examples.finetune.task import FinetuneTask, Measure
from examples.llama.batches import Batch
from examples.llama.config import UsageError
from examples.llama.model import Params
from examples.llama.report import Evaluation, entropy
from examples.llama.step import Losses, row_sums


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


class Classification(FinetuneTask):
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
            rows[0],
            config.text_key,
            config.label_key,
            config.data,
            tuple(config.unlabelled.split(",")),
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
