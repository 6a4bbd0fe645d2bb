"""`FinetuneTask` is what all fine-tuning has: a pretrained model, rows in memory."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from examples.encoder import model as encoder
from examples.finetune.chat import load_chat
from examples.finetune.config import FinetuneConfig, Tuning, settled
from examples.finetune.estimates import estimate_gradient
from examples.finetune.examples import Examples
from examples.finetune.export import check_free, export
from examples.finetune.files import Row, fingerprint, read_rows, split
from examples.finetune.models import Model, load_pretrained
from examples.llama import model as llama
from examples.llama.batches import Batch
from examples.llama.config import UsageError
from examples.llama.corpus import Counts
from examples.llama.model import Params, Wrap
from examples.llama.report import Evaluation
from examples.llama.step import Losses

Measure = Callable[[Batch], Any]


class FinetuneTask:
    """A task of the trainer's; what is read and how it is scored is a subclass's."""

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
