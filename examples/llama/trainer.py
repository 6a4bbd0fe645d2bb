"""A run: its data, its compiled steps, its state, and the loop over steps."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tqdm

from examples.llama import optimizers
from examples.llama.activations import ACTIVATIONS
from examples.llama.batches import (
    Batch,
    Position,
    Rows,
    prefetched,
    training_batches,
    validation_rows,
)
from examples.llama.checkpoint import Checkpoints, Store, find_start, on_device
from examples.llama.choose_steps import choose_steps
from examples.llama.config import IDENTITY, TrainConfig, UsageError, resolve
from examples.llama.corpus import Counts, load_corpora
from examples.llama.describe import describe, say_changes
from examples.llama.evaluate import Evaluation, eval_batches, evaluate
from examples.llama.model import abstract_model
from examples.llama.placement import (
    choose_placement,
    fresh_state,
    laid_out,
    layers_outermost,
)
from examples.llama.plan_layers import planned_train
from examples.llama.plan_report import write_plan
from examples.llama.processes import found_by_first, is_first
from examples.llama.report import Metrics
from examples.llama.rundir import choose_run_dir
from examples.llama.step import split_rows
from examples.llama.tokenizer import BPETokenizer, load_tokenizer, write_whole
from examples.llama.weights import WEIGHTS, step_key


class TrainingStopped(Exception):
    """The run cannot go on; what was saved before stays."""


class Trainer:
    """`Trainer(config).run(should_stop)`, on all devices or those given."""

    def __init__(self, config: TrainConfig, devices: Sequence[Any] | None = None):
        config, model = resolve(config)
        self.placement = choose_placement(config, devices)
        self.config = config = dataclasses.replace(config, mesh=self.placement.name)
        self.model_config = model
        _, self.abstract_params = abstract_model(model)
        places = self.placement.params(self.abstract_params)
        on_mesh = places if self.placement.mesh else None
        self.optimizer = optimizers.build_optimizer(config, on_mesh)
        run_dir = found_by_first(lambda: str(choose_run_dir(config)))
        self.run_dir = pathlib.Path(run_dir)
        self.train_text, self.val_text = load_corpora(
            config.data, config.val_data, config.text_key
        )
        own = self.run_dir / "tokenizer.json" if config.resume else None
        self.tokenizer = load_tokenizer(
            config.tokenizer, model.vocab_size, self.train_text, config.cache_dir, own
        )
        self.validation = list(validation_rows(self.rows(False), config.eval_tokens))
        if not self.validation:
            raise UsageError(
                f"corpus {self.val_text.name} holds no validation text: give more "
                "files, or --val-data"
            )
        self.tx = optimizers.guarded(config, self.optimizer)
        self.learning_rate = jax.jit(optimizers.learning_rate(config))
        self.weights = WEIGHTS[config.weights](config.param_dtype)
        self.layout = self.placement.layout(self.abstract_params, self.tx, self.weights)
        if config.layerwise:
            self.layout = layers_outermost(
                self.layout, self.tx, self.weights, self.abstract_params
            )
        self.make_steps = functools.partial(
            choose_steps, config, model, self.optimizer, self.weights, self.layout
        )
        self.steps = self.make_steps(ACTIVATIONS[config.activation_policy])
        self.compiled, self.timed_seconds, self.timed_tokens = False, 0.0, 0
        self._start()

    def rows(self, training: bool) -> Rows:
        config = self.config
        return Rows(
            self.train_text if training else self.val_text,
            self.tokenizer,
            config.seq_len,
            config.packing == "packed",
            config.seed if training else None,
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run."""
        side = self.config.side
        if side == "auto":  # the state is another where a mesh leads to other sides
            side = optimizers.sides(self.optimizer, self.abstract_params)
        return {name: getattr(self.config, name) for name in IDENTITY} | {
            **({"side": side} if side else {}),
            "corpus_hash": self.train_text.fingerprint(),
            "tokenizer_hash": self.tokenizer.fingerprint,
            "model": dataclasses.asdict(self.model_config),
        }

    def _start(self) -> None:
        store = Store(self.run_dir)
        start = None
        if self.config.resume:
            start = found_by_first(lambda: find_start(store, self.identity()))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(store, self.config.keep)
        self.step, self.position, self.tokens = start or 0, Position(), 0
        record = None
        if start is None:
            # Committed to devices, as what is restored: both take the same program.
            self.params, self.opt_state = fresh_state(
                self.layout, self.model_config, self.config.seed, self.tx, self.weights
            )
        else:
            params = jax.eval_shape(self.weights.store, self.abstract_params)
            opt_state = jax.eval_shape(self.tx.init, self.abstract_params)
            abstract = {"params": params, "opt_state": opt_state}
            places = {"params": self.layout.stored, "opt_state": self.layout.state}
            state = self.checkpoints.restore(start, on_device(abstract, places))
            state = laid_out(state, places)
            self.params, self.opt_state = state["params"], state["opt_state"]
            meta = store.meta(start)
            self.position = Position.from_json(meta["position"])
            self.tokens = meta["tokens"]
            print(f"going on from step {start} in {self.run_dir}", flush=True)
            record = self._plan_record(meta)
            say_changes(meta["settings"], dataclasses.asdict(self.config))
        describe(
            self.config,
            self.run_dir,
            self.optimizer,
            self.abstract_params,
            self.train_text,
            self.placement.mesh,
        )
        if isinstance(self.tokenizer, BPETokenizer) and is_first():
            write_whole(self.run_dir / "tokenizer.json", self.tokenizer.serialized)
        self.metrics = Metrics(self.run_dir, self.step, is_first())
        self.planner = None
        if self.config.activation_budget and jax.process_count() > 1:
            raise UsageError(
                "--activation-budget plans by what one process measures, and there are "
                f"{jax.process_count()}; give an --activation-policy instead"
            )
        if self.config.activation_budget:
            self.planner = planned_train(
                self.config,
                self.model_config,
                lambda wrap_layer: self.make_steps(wrap_layer).train,
                jax.jit(self.weights.load),
                self._log_plan,
                record,
            )
            self.steps = self.steps._replace(train=self.planner)

    def _plan_record(self, meta: dict[str, Any]) -> Any:
        """What the saved run knew of its plan, if this one asks for the same."""
        names = ("activation_budget", "activation_error", "replan_every")
        same = all(
            meta["settings"].get(n) == getattr(self.config, n)
            for n in (*names, "batch_size", "micro_batches", "seq_len")
        )
        return meta.get("activation_plan") if same else None

    def _log_plan(self, line: dict[str, Any]) -> None:
        """Every decision goes to the metrics, every plan that is used to the folder."""
        self.metrics.add(line)
        if self.planner is not None and line["activation_plan"] != "compiling":
            write_plan(self.planner.plan, self.run_dir)

    def save(self) -> None:
        """Saves the present step in the background, once."""
        self.checkpoints.wait()
        if self.step == self.checkpoints.last_saved:
            return
        state = {"params": self.params, "opt_state": self.opt_state}
        meta = {
            "identity": self.identity(),
            "position": self.position.to_json(),
            "tokens": self.tokens,
            "settings": dataclasses.asdict(self.config),
            "activation_plan": self.planner and self.planner.record(),
        }
        self.checkpoints.save(self.step, state, meta)

    def evaluate(self, should_stop: Callable[[], bool]) -> Evaluation | None:
        config = self.config
        batches = eval_batches(self.validation, config.eval_batch_size, config.seq_len)
        batches = map(self.placement.rows, batches)
        result = evaluate(self.steps.evaluate, self.params, batches, should_stop)
        if result is not None:
            line = {
                "step": self.step,
                "val_loss": result.loss,
                "val_perplexity": result.perplexity,
                "val_tokens": result.tokens,
            }
            if config.galore_compat:
                line["val_perplexity_galore_compat"] = result.compat_perplexity
            self.metrics.add(line)
        return result

    def run(self, should_stop: Callable[[], bool]) -> Evaluation | None:
        """Trains to the last step; None when it was told to stop before."""
        config = self.config
        last = min(config.steps, config.stop_step or config.steps)
        hidden = None if is_first() else True  # None: where nobody looks
        batches = prefetched(
            training_batches(self.rows(True), config.batch_size, self.position)
        )
        bar = tqdm.tqdm(
            total=last, initial=self.step, unit="step", disable=hidden, smoothing=0.05
        )
        try:
            while self.step < last and not should_stop():
                self._step(next(batches), bar)
                if due(self.step, config.eval_every) and self.step < last:
                    if result := self.evaluate(should_stop):
                        bar.write(
                            f"step {self.step}: validation perplexity "
                            f"{result.perplexity:.3f}"
                        )
                if due(self.step, config.checkpoint_every):
                    self.save()
        finally:
            bar.close()
            batches.close()
        self.save()
        return None if should_stop() else self.evaluate(should_stop)

    def _step(self, item: tuple[Batch, Position], bar: Any) -> None:
        batch, position = item
        started = time.perf_counter()
        micro = self.placement.batch(split_rows(batch, self.config.micro_batches))
        key = step_key(self.config.seed, self.step)
        self.params, self.opt_state, metrics = self.steps.train(
            self.params, self.opt_state, micro, key
        )
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - started
        lr = float(self.learning_rate(self.step))
        epoch = position.cursor.epoch + 1
        if epoch > self.position.cursor.epoch + 1:
            counts = Counts(dict(position.cursor.counts))
            bar.write(f"step {self.step + 1}: epoch {epoch} of the corpus ({counts})")
        self.step, self.position = self.step + 1, position
        self.tokens += int(values["tokens"])
        if not self.compiled:  # the first step's time is the compiler's
            self.compiled = True
        else:
            self.timed_tokens += int(values["tokens"])
            self.timed_seconds += seconds
        self._log(values, lr, epoch, seconds)
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {self.tokens_per_second():.0f} tokens/s"
        )
        bar.update()

    def tokens_per_second(self) -> float:
        """Over this process's steps, without compilation and validation."""
        return self.timed_tokens / max(self.timed_seconds, 1e-9)

    def _log(
        self, values: dict[str, Any], lr: float, epoch: int, seconds: float
    ) -> None:
        loss = values["loss"]
        line = {
            "step": self.step,
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "grad_norm": values["grad_norm"],
            "tokens": self.tokens,
            "epoch": epoch,
            "skipped": values["skipped"],
            "seconds": round(seconds, 4),
        }
        if not math.isfinite(line["grad_norm"]):
            line["grad_norm"] = None
        self.metrics.add(line)
        if values["skipped_in_a_row"] >= self.config.max_skips:
            raise TrainingStopped(
                f"step {self.step}: the gradient was not finite "
                f"{values['skipped_in_a_row']} times in a row (--max-skips); "
                "parameters are those before the first of them. A lower --lr, --clip "
                "1 or --compute-dtype float32 may help"
            )

    def close(self) -> list[pathlib.Path]:
        """Completes the running save and writes the reports; returns the files."""
        self.checkpoints.close()
        return self.metrics.close()


def due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
