"""`Trainer` trains a LLaMA on real text: `python -m examples.llama.train --help`.

Exit codes: 0 the run ended, or was asked to stop, and its last state is saved; 1 it is
not, or training cannot go on; 2 the command, the data or the checkpoint needs mending
(nothing was overwritten); 130 Ctrl-C before the first step. With `--verify`: 0 all
checkpoints are good, 1 some are not.
"""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from examples.llama.interrupt import end_at_once

if __name__ == "__main__":  # what follows takes seconds to load
    signal.signal(signal.SIGINT, end_at_once)

import jax
import optax
import tqdm

import lowrank_optax as lro
from examples.llama import optimizers, resize
from examples.llama.batches import Batch, Position, prefetched, training_batches
from examples.llama.budget import planned_train, saved_plan, write_plan
from examples.llama.checkpoint import (
    Checkpoints,
    Store,
    find_start,
    on_device,
    orbax_log,
    verify,
)
from examples.llama.choose_steps import choose_steps, laid_out, layers_outermost
from examples.llama.command_line import TRAINING, parsed
from examples.llama.config import (
    IDENTITY,
    Resolved,
    TrainConfig,
    UsageError,
    resolve,
)
from examples.llama.corpus import Counts
from examples.llama.logs import open_logs
from examples.llama.model import count_params
from examples.llama.picture import About
from examples.llama.placement import choose_placement, started
from examples.llama.presets import parameters
from examples.llama.processes import (
    any_of,
    found_by_first,
    is_first,
    only_first_prints,
    start_processes,
    stop_on_signals,
)
from examples.llama.report import (
    Evaluation,
    Metrics,
    closing_table,
    describe,
    environment,
    finite,
    readable_bytes,
    say_changes,
)
from examples.llama.run_folder import (
    brief,
    check_writable,
    choose_run_dir,
    only_writer,
    say,
    usable,
)
from examples.llama.step import split_rows
from examples.llama.task import Pretraining, Task


class TrainingStopped(Exception):
    """The run cannot go on; what was saved before stays."""


class Trainer:
    """`Trainer(config).run(should_stop)`, on all devices or those given.

    It is made in the order of the methods below: flags and devices, optimizer, text,
    steps, and a state that is fresh or restored. `run` is the loop over steps, with
    validation and checkpoints between them; `close` writes the reports and lets go of
    the run's folder. What is trained on what is the task's to say, which `make_task`
    makes of the flags.
    """

    def __init__(
        self,
        config: TrainConfig,
        devices: Sequence[Any] | None = None,
        make_task: Callable[[Any], Task] = Pretraining,
    ):
        use_compilation_cache(config.compilation_cache)
        # The flags. All that can refuse them comes before text is read and tokenized.
        self.task, self.resized = make_task(config), resize.asked_for(config)
        print(" | ".join(f"{k} {v}" for k, v in environment().items()), flush=True)
        self.placement = choose_placement(self.task.config, devices)
        self.config = dataclasses.replace(self.task.config, mesh=self.placement.name)
        # From shapes alone: an unknown optimizer is refused before any text is read.
        self._make_optimizer()
        # One process chooses: the others would find the folder taken by then.
        self.run_dir = pathlib.Path(found_by_first(lambda: str(self._folder())))
        with usable("the text"):
            self.task.read(self.run_dir)
        self._make_steps()
        # Held until `close`, or until the run is refused.
        with contextlib.ExitStack() as held, usable(f"run folder {self.run_dir}"):
            self._start(held)
            self._held = held.pop_all()

    def _folder(self) -> pathlib.Path:
        """The folder of the run; one that cannot be used is refused."""
        run_dir = choose_run_dir(self.config)
        check_writable("--run-dir", run_dir)
        return run_dir

    def _make_optimizer(self) -> None:
        """The optimizer for the shapes of the model's parameters; nothing is made."""
        self.abstract_params = self.task.params
        self.optimizer, self.tx = self._optimizer_of(self.config)
        # For the metrics alone: the optimizer has the schedule inside.
        self.learning_rate = jax.jit(optimizers.learning_rate(self.config))

    def _optimizer_of(self, config: Resolved) -> tuple[Any, Any]:
        """The optimizer that flags name, and the same with clipping and guard."""
        places = self.placement.params(self.abstract_params)
        # On one device nothing is cut, and `--side auto` has nothing to choose by.
        on_mesh = places if self.placement.mesh else None
        optimizer = optimizers.build_optimizer(config, on_mesh, self.task.select)
        optimizers.check_projects(config, optimizer, self.abstract_params)
        return optimizer, optimizers.guarded(config, optimizer, self.task.estimate)

    def _make_steps(self) -> None:
        """Where parameters and state lie, and the compiled steps on them."""
        config, params = self.config, self.abstract_params
        self.weights = lro.weight_storage(
            config.weights, config.param_dtype, layer_axis=0
        )
        self.layout = self.placement.layout(params, self.tx, self.weights)
        if config.layerwise:
            self.layout = layers_outermost(self.layout, self.tx, self.weights, params)
        # Kept as a function, since every new plan of activations makes the step anew.
        self.make_steps = functools.partial(
            choose_steps, self.task, self.optimizer, self.weights, self.layout
        )
        self.steps = self.make_steps(self.task.activations[config.activation_policy])
        self.compiled, self.timed_seconds, self.timed_tokens = False, 0.0, 0
        self.peak_bytes = 0

    def _start(self, held: contextlib.ExitStack) -> None:
        """A fresh state, or the newest good one of the run that goes on."""
        config, store = self.config, Store(self.run_dir)
        found_by_first(lambda: held.enter_context(only_writer(self.run_dir)))
        held.enter_context(orbax_log(self.run_dir / "orbax.log"))
        start = None
        if config.resume:
            # One process looks, since a damaged checkpoint is moved on the way.
            start = found_by_first(
                lambda: find_start(store, self.identity(), self.resized)
            )
        self.checkpoints = Checkpoints(store, config.keep)
        self.step, self.position, self.tokens = start or 0, Position(), 0
        meta = None
        frozen = self.placement.params(self.task.frozen)
        if start is None:
            # Committed to devices, as what is restored: both take the same program.
            params, self.frozen = self.task.start(self.layout.params, frozen)
            self.params, self.opt_state = started(
                self.layout, params, self.tx, self.weights
            )
        else:
            self.frozen = self.task.frozen_at(frozen)
            meta = self._restore(start)
            say_changes(meta["settings"], dataclasses.asdict(config))
        describe(
            config,
            self.run_dir,
            self.optimizer,
            self.abstract_params,
            self.task.about(),
            self.placement.mesh,
        )
        self.task.leave(self.run_dir)
        # Lines behind the start are dropped: their steps will be run again.
        logs = open_logs(config.log_to, self.run_dir, dataclasses.asdict(config))
        self.metrics = Metrics(self.run_dir, self.step, is_first(), logs)
        self.planner = None
        # Under a budget the step is the planner's, which measures, plans and compiles
        # at its first call and again from time to time.
        if config.activation_budget:
            self.planner = planned_train(
                config,
                self.task.model,
                lambda wrap_layer: self.make_steps(wrap_layer).train,
                jax.jit(self.weights.load),
                self._log_plan,
                saved_plan(meta, config) if meta else None,
            )
            self.steps = self.steps._replace(train=self.planner)

    def _restore(self, start: int) -> dict[str, Any]:
        """Takes the state saved at a step, and returns what was noted beside it."""
        meta, config = self.checkpoints.store.meta(start), self.config
        params = jax.eval_shape(self.weights.store, self.abstract_params)
        saved = resize.as_saved(config, meta["identity"])
        optimizer, tx, layout = self.optimizer, self.tx, self.layout
        if saved != config:
            optimizer, tx = self._optimizer_of(saved)
            resize.check(tx, self.tx, self.abstract_params)
            layout = self.placement.layout(self.abstract_params, tx, self.weights)
        opt_state = jax.eval_shape(tx.init, self.abstract_params)
        abstract = {"params": params, "opt_state": opt_state}
        places = {"params": self.layout.stored, "opt_state": layout.state}
        # Shapes with shardings: every array is read to where it will lie. Orbax knows
        # nothing of layouts in memory, which come after.
        state = self.checkpoints.restore(start, on_device(abstract, places))
        state = laid_out(state, places)
        self.params, self.opt_state = state["params"], state["opt_state"]
        if saved != config:
            self.opt_state = jax.jit(
                lambda x: lro.resize_state(
                    layout.fetched(x), tx, self.tx, self.abstract_params
                ),
                out_shardings=self.layout.state,
            )(self.opt_state)
            args = (saved, config, optimizer, self.optimizer, self.abstract_params)
            print("state carried over: " + "; ".join(resize.lines(*args)), flush=True)
        try:
            self.position = Position.from_json(meta["position"])
            self.tokens, _ = int(meta["tokens"]), dict(meta["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the record of checkpoint {start} is not of this program: {error!r}"
            ) from error
        print(f"going on from step {start} in {self.run_dir}", flush=True)
        return meta

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run."""
        side = self.config.side
        if side == "auto":  # the state is another where a mesh leads to other sides
            side = optimizers.sides(self.optimizer, self.abstract_params)
        return {name: getattr(self.config, name) for name in IDENTITY} | {
            **({"side": side} if side else {}),
            **self.task.identity(),
        }

    def run(self, should_stop: Callable[[], bool]) -> Evaluation | None:
        """Trains to the last step; None when it was told to stop before."""
        config = self.config
        last = min(config.steps, config.stop_step or config.steps)
        hidden = None if is_first() else True  # None: where nobody looks
        # A thread makes the next batches while the device computes.
        batches = prefetched(
            training_batches(self.task.rows(True), config.batch_size, self.position)
        )
        bar = tqdm.tqdm(
            total=last, initial=self.step, unit="step", disable=hidden, smoothing=0.05
        )
        try:
            # All processes ask at once and get one answer, so that none is left alone
            # in a step. The validation after the last step comes behind the loop.
            while self.step < last and not should_stop():
                self._step(next(batches), bar)
                if due(self.step, config.eval_every) and self.step < last:
                    if result := self.evaluate(should_stop):
                        bar.write(f"step {self.step}: {result.brief}")
                if due(self.step, config.checkpoint_every):
                    self.save()
        finally:
            bar.close()
            # Ends the thread, whatever ended the loop.
            batches.close()
        # Finished or told to stop: the last step is saved in both cases.
        self.save()
        result = None if should_stop() else self.evaluate(should_stop)
        self.checkpoints.wait()
        return result

    def _step(self, item: tuple[Batch, Position], bar: Any) -> None:
        batch, position = item
        if not self.compiled:
            bar.write(f"step {self.step + 1}: compiling")
        started = time.perf_counter()
        micro = self.placement.batch(split_rows(batch, self.config.micro_batches))
        # Of seed and step alone, so that a run that goes on rounds as it would have.
        key = lro.rounding_key(self.config.seed, self.step)
        args = (self.params, self.opt_state, micro, key)
        if self.frozen:
            args = (*args, self.frozen)
        if not self.compiled and self.planner is None:
            train = self.steps.train.lower(*args).compile()
            self.steps = self.steps._replace(train=train)
            self.peak_bytes = peak_bytes(train)
        self.params, self.opt_state, metrics = self.steps.train(*args)
        # Waits for the device, so that the seconds are those of the step.
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - started
        lr = float(self.learning_rate(self.step))
        epoch = position.cursor.epoch + 1
        if epoch > self.position.cursor.epoch + 1:
            counts = Counts(dict(position.cursor.counts))
            read = f" of the corpus ({counts})" if counts else ""
            bar.write(f"step {self.step + 1}: epoch {epoch}{read}")
        # Only now, with the step done: a save holds the position behind its last batch.
        self.step, self.position = self.step + 1, position
        self.tokens += int(values["tokens"])
        if not self.compiled:  # the first step's time is the compiler's
            self.compiled = True
            bar.unpause()  # and counts for nothing in what is left
        else:
            self.timed_tokens += int(values["tokens"])
            self.timed_seconds += seconds
        self.metrics.add(
            {
                "step": self.step,
                "loss": finite(values["loss"]),
                "lr": lr,
                "grad_norm": finite(values["grad_norm"]),
                "tokens": self.tokens,
                "epoch": epoch,
                "skipped": values["skipped"],
                "seconds": round(seconds, 4),
                **{k: finite(values[k]) for k in ("captured_energy",) if k in values},
            }
        )
        # After the metrics, whose last line then shows the step that ended the run.
        if values["skipped_in_a_row"] >= self.config.max_skips:
            raise TrainingStopped(
                f"step {self.step}: the gradient was not finite "
                f"{values['skipped_in_a_row']} times in a row (--max-skips); "
                "parameters are those before the first of them. A lower --lr, --clip "
                "1 or --compute-dtype float32 may help"
            )
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {self.tokens_per_second():.0f} tokens/s"
        )
        bar.update()

    def tokens_per_second(self) -> float:
        """Over this process's steps, without compilation and validation."""
        return self.timed_tokens / max(self.timed_seconds, 1e-9)

    def evaluate(self, should_stop: Callable[[], bool]) -> Evaluation | None:
        result = self.task.evaluate(self.measure, should_stop)
        if result is not None:
            line = {"step": self.step, **result.line()}
            if self.config.galore_compat:
                line["val_perplexity_galore_compat"] = result.compat_perplexity
            self.metrics.add(line)
        return result

    def measure(self, batch: Batch) -> Any:
        """What the compiled evaluation says of the rows of a batch."""
        frozen = (self.frozen,) if self.frozen else ()
        return self.steps.evaluate(self.params, self.placement.rows(batch), *frozen)

    def save(self) -> None:
        """Saves the present step in the background, once."""
        # Only a complete save is known as the last one.
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

    def _log_plan(self, line: dict[str, Any]) -> None:
        """Every decision goes to the metrics, every plan that is used to the folder."""
        self.metrics.add(line)
        if self.planner is not None and line["activation_plan"] != "compiling":
            write_plan(self.planner.plan, self.run_dir)

    def close(self) -> list[pathlib.Path]:
        """Completes the running save and writes the reports; returns the files."""
        with self._held:
            self.checkpoints.close()
            return self.metrics.close(self.about)

    def about(self) -> About:
        """What the picture has beside the metrics."""
        config, unit = self.config, self.task.loss_unit
        rank = f", rank {config.rank}" if "rank" in parameters(config.optimizer) else ""
        of = unit.removeprefix("nats per ")
        return About(
            f"{config.preset} with {config.optimizer}{rank}, peak learning rate "
            f"{config.lr:g} ({self.run_dir.name})",
            unit,
            of if of in ("byte", "token") else "",
            self.task.baseline(),
            self.memory(),
        )

    def memory(self) -> list[tuple[str, int]]:
        """Bytes of what lies in memory, beside AdamW's state."""
        rows = [
            (f"weights, {self.config.weights}", lro.bytes_per_device(self.params)),
            (f"optimizer state, {self.config.optimizer}", self.state_bytes()),
        ]
        if self.config.optimizer != "adamw":
            rows.append(("optimizer state, adamw", self.adamw_bytes()))
        # Nobody counted where plans are made again and again, or no step was made.
        peak = self.peak_bytes
        return rows + ([("a step, by the compiler", peak)] if peak else [])

    def state_bytes(self) -> int:
        return optimizers.state_bytes(self.optimizer, self.abstract_params)

    def adamw_bytes(self) -> int:
        return optimizers.state_bytes(optax.adamw(1e-3), self.abstract_params)

    def check_saved(self) -> None:
        """Raises unless the present state is on the disk."""
        saved = self.checkpoints.last_saved
        if saved != self.step:
            newest = (
                "there is no checkpoint"
                if saved is None
                else (f"the newest checkpoint is of step {saved}")
            )
            raise TrainingStopped(
                f"the state of step {self.step} could not be saved; {newest}"
            )


def use_compilation_cache(folder: str) -> None:
    """Compiled programs are kept in the folder, if one is named."""
    if folder:
        check_writable("--compilation-cache", pathlib.Path(folder))
        with usable(f"--compilation-cache {folder}"):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", folder)


def peak_bytes(program: Any) -> int:
    """The most that a device holds at once, by the compiler's own count."""
    sizes = program.memory_analysis()
    # What is donated counts once: as an argument.
    held = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return held + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def summary(
    trainer: Trainer,
    closing: list[tuple[str, str]],
    files: list[pathlib.Path],
    seconds: float,
) -> str:
    """The closing table, with the task's own rows."""
    config, params = trainer.config, trainer.abstract_params
    frozen, unit = count_params(trainer.frozen), trainer.task.unit
    memory = [(name, readable_bytes(held)) for name, held in trainer.memory()]
    share = trainer.state_bytes() / trainer.adamw_bytes()
    rows = [
        ("model", f"{config.preset}, {count_params(params) + frozen:,} parameters"),
        *([("trained", f"{count_params(params):,}")] if frozen else []),
        *memory,
        ("state beside AdamW's", f"{share:.0%}"),
        (f"steps, {unit}", f"{trainer.step:,}, {trainer.tokens:,}"),
        ("speed", f"{trainer.tokens_per_second():,.0f} {unit}/s"),
        ("time", f"{seconds:.0f} s"),
        *closing,
    ]
    saved = trainer.checkpoints.store.steps()
    names = [path.name for path in files] + (["checkpoints"] if saved else [])
    rows.append(("files", f"{trainer.run_dir}: {', '.join(names)}"))
    return closing_table(rows)


def train(config: TrainConfig, make_task: Callable[[Any], Task] = Pretraining) -> None:
    started = time.perf_counter()
    # Before anything asks JAX for its devices.
    start_processes(config.distributed)
    # Of several processes none ends alone, since the others would wait for it.
    trainer, several = None, jax.process_count() > 1

    def unsaved() -> bool:
        return several or (trainer is not None and trainer.compiled)

    with stop_on_signals(unsaved) as asked, only_first_prints():
        should_stop = any_of(asked)
        trainer = Trainer(config, make_task=make_task)
        files: list[pathlib.Path] = []
        closing: list[tuple[str, str]] = []
        try:
            result = trainer.run(should_stop)
            if result is not None:  # all processes: it may compute
                closing = trainer.task.closing(result, trainer)
        finally:
            # However the loop ended, a save under way is completed.
            files = trainer.close()
        if result is not None and is_first():
            print(summary(trainer, closing, files, time.perf_counter() - started))
        trainer.check_saved()
        if result is None:
            print(
                f"stopped at step {trainer.step}; saved in {trainer.run_dir}, go on "
                "with --resume",
                flush=True,
            )


def main(args: Sequence[str] | None = None) -> int:
    try:
        config = parsed(
            TrainConfig,
            "python -m examples.llama.train",
            args,
            TRAINING,
            lambda config: dataclasses.asdict(resolve(config)[0]),
        )
    except UsageError as error:  # beside --help
        say(f"error: {error}")
        return 2
    return run_command(config, Pretraining)


def run_command(config: TrainConfig, make_task: Callable[[Any], Task]) -> int:
    """Trains, or verifies; returns the exit code."""
    try:
        if config.verify:
            run_dir = choose_run_dir(dataclasses.replace(config, resume=True))
            with usable(f"--run-dir {run_dir}"):
                return 0 if verify(Store(run_dir)) else 1
        train(config, make_task)
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except TrainingStopped as error:
        say(f"stopped: {error}")
        return 1
    except OSError as error:
        say(f"stopped: {brief(error)}")
        return 1
    except KeyboardInterrupt:  # while nothing is there to be saved
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
