"""Runs of the example's tiny LLaMA on real text, for comparisons of optimizers.

The text is cut and encoded once. All runs of one seed start from the same parameters
and see the same batches. A file of runs holds those made under one group of settings,
and an interrupted comparison goes on from it.
"""

import argparse
import fnmatch
import json
import math
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from examples.llama import optimizers
from examples.llama.batches import Position, Rows, training_batches, validation_rows
from examples.llama.budget import planned_train
from examples.llama.config import Resolved, TrainConfig, resolve
from examples.llama.corpus import load_corpora
from examples.llama.model import Params, Wrap, abstract_model, init_params
from examples.llama.report import eval_batches, evaluate
from examples.llama.run_folder import write_whole
from examples.llama.step import make_steps, split_rows
from examples.llama.tokenizer import load_tokenizer


class Step(NamedTuple):
    """What an optimizer step leaves; the next step donates `params` and `state`."""

    number: int
    params: Params
    state: Any
    metrics: dict[str, jax.Array]


class Workload:
    """The text, and training on it."""

    def __init__(self, **flags: Any):
        self.config, self.model = resolve(TrainConfig(preset="tiny", **flags))
        self.text, held_out = load_corpora("", "", self.config.text_key)
        self.tokenizer = load_tokenizer(
            self.config.tokenizer, self.model.vocab_size, self.text, ""
        )
        rows = Rows(held_out, self.tokenizer, self.config.seq_len, True, None)
        self.validation = list(validation_rows(rows, self.config.eval_tokens))
        self.definition, self.abstract_params = abstract_model(self.model)
        self.evaluate = make_steps(self.definition, optax.identity()).evaluate

    def settings(self, names: str, **more: Any) -> dict[str, Any]:
        """Returns what all runs of one file must have in common."""
        return {name: getattr(self.config, name) for name in names.split()} | more | {
            "corpus_hash": self.text.fingerprint(),
            "jax": jax.__version__,
            "platform": jax.default_backend(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }  # fmt: skip

    def train(
        self,
        config: Resolved,
        tx: optax.GradientTransformation,
        log: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> Iterator[Step]:
        """Trains from the start that `config.seed` says, clipped and guarded.

        `log` is told what is decided for `config.activation_budget`.
        """
        tx = optimizers.guarded(config, tx)

        def build(wrap_layer: Wrap | None) -> Any:
            return make_steps(self.definition, tx, wrap_layer=wrap_layer).train

        train = build(None)
        if config.activation_budget:
            train = planned_train(config, self.model, build, lambda params: params, log)
        params = init_params(self.model, config.seed)
        state = jax.jit(tx.init)(params)
        text = Rows(self.text, self.tokenizer, config.seq_len, True, config.seed)
        batches = training_batches(text, config.batch_size, Position())
        for number in range(1, config.steps + 1):
            batch = split_rows(next(batches)[0], config.micro_batches)
            params, state, metrics = train(params, state, batch)
            yield Step(number, params, state, metrics)

    def outcome(
        self,
        config: Resolved,
        tx: optax.GradientTransformation,
        log: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Trains to the last step; returns the losses there and the seconds."""
        started = time.perf_counter()
        for step in self.train(config, tx, log):
            if step.number == config.steps:
                return {
                    "val_loss": self.validation_loss(step.params),
                    "train_loss": step.metrics["loss"].item(),
                    "skipped_steps": int(step.metrics["skipped"]),
                    "seconds": round(time.perf_counter() - started, 1),
                }
        raise ValueError("No step was made.")

    def validation_loss(self, params: Params) -> float | None:
        """Returns nats per token of the validation text, None if not finite."""
        config = self.config
        batches = eval_batches(self.validation, config.eval_batch_size, config.seq_len)
        result = evaluate(self.evaluate, params, batches)
        assert result is not None  # nothing asked it to stop
        return result.loss if math.isfinite(result.loss) else None


def add_flags(parser: argparse.ArgumentParser, steps: int, seeds: list[int]) -> None:
    """Adds the flags of every comparison."""
    parser.add_argument("--steps", type=int, default=steps, help="length of a run")
    parser.add_argument("--seeds", type=int, nargs="*", default=seeds)
    parser.add_argument("--only", nargs="*", default=["*"], help="names, * allowed")
    parser.add_argument("--out", type=pathlib.Path, help="JSON to write, or to go on")


def run_missing(
    options: argparse.Namespace,
    settings: dict[str, Any],
    names: Iterable[str],
    run: Callable[[str, int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Calls `run(name, seed)` for what the file lacks; returns all its runs."""
    runs, names = earlier(options.out, settings), list(names)
    done = {(run["name"], run["seed"]) for run in runs}
    for seed in options.seeds:  # outermost: what is finished early can be compared
        for name in names:
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
            if not wanted or (name, seed) in done:
                continue
            runs.append(run(name, seed))
            brief = {k: v for k, v in runs[-1].items() if not isinstance(v, list)}
            print(json.dumps(brief), file=sys.stderr, flush=True)
            if options.out:
                report = json.dumps({"settings": settings, "runs": runs}, indent=1)
                # The lists of a run on one line each.
                report = re.sub(r"\n {4,}|\n {3,}(?=\])", " ", report)
                write_whole(options.out, report + "\n")
    return runs


def earlier(out: pathlib.Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the runs that the file holds already, made under the same settings."""
    if out is None or not out.exists():
        return []
    report = json.loads(out.read_text(encoding="utf-8"))
    was = report["settings"]
    changed = [k for k in settings | was if was.get(k) != settings.get(k)]
    if changed:
        sys.exit(f"{out} was made under another {', '.join(changed)}; move it away")
    return report["runs"]
