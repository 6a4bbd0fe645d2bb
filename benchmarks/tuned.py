"""Losses of all methods at tuned learning rates: ``python -m benchmarks.tuned``.

LLaMAs of the trainer learn the sources of Python's standard library. A file has one
JSON line for every run, and what it has is not run again, so that a sweep can be
stopped and goes on. The stages::

    search    the small model, seed 0: rates a factor of 2 apart around a first guess,
              until the best has a worse one on either side
    tables    the small model, matrices by one method at its best rate: the same search
              for the rates of what embedding and head may get in the place of Adam
    wide      the search once more on the tiny model, twice as wide and deep, to see
              whether a rate carries over
    confirm   the tiny model, three seeds, at the best rate of the search and at half of
              it, as wider models like lower ones
    long      the small model for ten times the steps, at the same two rates
    longest   for twenty-five times the steps, at the better rate of the long run, or
              at the same two rates where there is none
    decay     the longest run once more at its best rate, with weight decay

The matrices of the layers get the method. Embedding, head and norms get Adam in every
row, at a rate of their own, that of AdamW's best, so that rows differ in the treatment
of matrices alone. Gradients are clipped to norm 1. Weights decay in the stage of that
name alone. Rates warm up over a tenth of the steps and end at a tenth of their peak, on
a cosine.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from benchmarks._contenders import CONTENDERS, TABLES, Contender
from benchmarks._runs import Workload
from examples.llama.batches import Position, Rows, training_batches
from examples.llama.model import Params, abstract_model, init_params
from examples.llama.report import eval_batches, evaluate
from examples.llama.step import make_steps, mean_gradient, split_rows

FULL_RATE = 0.02  # of Adam on embedding, head and norms
CLIP = 1.0
DECAY = 0.1  # a step, times the learning rate, of matrices, embedding and head


class Stage(NamedTuple):
    """A size of model and a length of run."""

    width: int
    layers: int
    batch: int
    steps: int
    seeds: tuple[int, ...]


STAGES = {
    "search": Stage(64, 2, 8, 200, (0,)),
    "tables": Stage(64, 2, 8, 200, (0,)),
    "wide": Stage(128, 4, 8, 200, (0,)),
    "confirm": Stage(128, 4, 8, 300, (0, 1, 2)),
    "long": Stage(64, 2, 8, 2000, (0,)),
    "longest": Stage(64, 2, 8, 5000, (0,)),
    "decay": Stage(64, 2, 8, 5000, (0,)),
}


class Bench:
    """A model of one width and its text; every run of a seed sees the same batches."""

    def __init__(self, stage: Stage, work: Workload):
        """Scales the tiny model to the width of the stage."""
        self.model = dataclasses.replace(
            work.model,
            width=stage.width,
            ff_width=11 * stage.width // 4,
            layers=stage.layers,
        )
        self.stage, self.work, self.rank = stage, work, stage.width // 4
        self.definition, self.abstract = abstract_model(self.model)
        self.evaluate = make_steps(self.definition, optax.identity()).evaluate
        self._batches: dict[int, list[Any]] = {}

    def batches(self, seed: int) -> list[Any]:
        """Returns the batches of a run, made once for each seed."""
        if seed not in self._batches:
            work, stage = self.work, self.stage
            rows = Rows(work.text, work.tokenizer, work.config.seq_len, True, seed)
            source = training_batches(rows, stage.batch, Position())
            self._batches[seed] = [
                split_rows(next(source)[0], 1) for _ in range(stage.steps)
            ]
        return self._batches[seed]

    def validation_loss(self, params: Params) -> float:
        """Returns nats per byte of text that nothing was trained on."""
        config = self.work.config
        batches = eval_batches(
            self.work.validation, config.eval_batch_size, config.seq_len
        )
        result = evaluate(self.evaluate, params, batches)
        assert result is not None  # nothing asked it to stop
        return result.loss


def roles(params: Any) -> Any:
    """Returns "matrix" for the kernels of layers, "table" for embedding and head."""

    def label(path: Any, leaf: Any) -> str:
        if "norm" in jax.tree_util.keystr(path):
            return "vector"
        return "matrix" if leaf.ndim == 3 else "table"

    return jax.tree_util.tree_map_with_path(label, params)


class Trial:
    """One contender on one bench: a step compiled once for all rates and seeds."""

    def __init__(self, bench: Bench, contender: Contender):
        """Prepares the step; it is compiled at its first call."""
        parts: dict[Any, Any] = {
            "matrix": contender.build(bench.rank),
            "table": TABLES[contender.tables],
            "vector": optax.adam(1.0),
        }
        self.bench, self.whole = bench, contender.whole
        self.tx = optax.partition(parts, self.roles)
        self.clipped = optax.chain(optax.clip_by_global_norm(CLIP), self.tx)
        self.step = jax.jit(self._step, donate_argnums=(4, 5))

    def roles(self, params: Any) -> Any:
        """Returns which part every leaf belongs to."""
        found = roles(params)
        return jax.tree.map(lambda _: "matrix", found) if self.whole else found

    def _step(self, rates, decay, number, steps, params, state, batch):
        loss, grads = mean_gradient(self.bench.definition, params, batch)
        updates, state = self.clipped.update(grads, state, params)
        warm, part = steps / 10, (number + 1) / steps
        shape = jnp.minimum(
            (number + 1) / warm,
            0.1 + 0.45 * (1 + jnp.cos(jnp.pi * jnp.clip((part - 0.1) / 0.9, 0, 1))),
        )
        updates = jax.tree.map(
            lambda label, u, p: (
                shape * rates[label] * (u - (0.0 if label == "vector" else decay) * p)
            ),
            self.roles(params), updates, params,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state, loss

    def state_bytes(self) -> dict[str, int]:
        """Returns the bytes of state of the matrices and of all else."""
        state = jax.eval_shape(self.tx.init, self.bench.abstract)
        return {k: lro.bytes_per_device(v) for k, v in state.inner_states.items()}

    def run(
        self, rate: float, seed: int, table_rate: float = FULL_RATE, decay: float = 0.0
    ) -> dict[str, Any]:
        """Trains once."""
        bench, started = self.bench, time.perf_counter()
        params = init_params(bench.model, seed)
        state = jax.jit(self.clipped.init)(params)
        rates = {"matrix": rate, "table": table_rate, "vector": FULL_RATE}
        rates = {role: jnp.float32(peak) for role, peak in rates.items()}
        steps, losses, finished = bench.stage.steps, [], False
        for number, batch in enumerate(bench.batches(seed)):
            params, state, loss = self.step(
                rates, jnp.float32(decay), jnp.float32(number), jnp.float32(steps),
                params, state, batch,
            )  # fmt: skip
            losses.append(loss)
            if number % 20 == 0 and not math.isfinite(loss.item()):
                break
        else:
            finished = True
        loss = bench.validation_loss(params) if finished else math.nan
        tail = jnp.mean(jnp.stack(losses[-50:])).item()
        return {
            "val_loss": round(loss, 5) if math.isfinite(loss) else None,
            "train_loss": round(tail, 5) if math.isfinite(tail) else None,
            "seconds": round(time.perf_counter() - started, 1),
        }


class Log:
    """The file of runs."""

    def __init__(self, path: pathlib.Path):
        """Reads what is there."""
        self.path, self.runs = path, []
        if path.exists():
            self.runs = [json.loads(line) for line in path.read_text().splitlines()]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Returns the runs that have these entries."""
        return [r for r in self.runs if wanted.items() <= r.items()]

    def add(self, run: dict[str, Any]) -> None:
        """Appends a run."""
        self.runs.append(run)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), file=sys.stderr, flush=True)


def loss_of(run: dict[str, Any]) -> float:
    """Returns a run's loss, infinite where it diverged."""
    return math.inf if run["val_loss"] is None else run["val_loss"]


def best_rate(log: Log, name: str, stage: str = "search") -> float | None:
    """Returns the best rate of a search, None where an edge of its rates is best."""
    found = {r["rate"]: loss_of(r) for r in log.find(stage=stage, name=name)}
    if not found:
        return None
    best = min(found, key=lambda rate: found[rate])
    bracketed = {2 * best, best / 2} <= found.keys()
    return best if bracketed else None


def better_rate(log: Log, name: str, stage: str) -> float | None:
    """Returns the better one of the rates that a stage tried, None where it did not."""
    runs = log.find(stage=stage, name=name)
    return min(runs, key=loss_of)["rate"] if runs else None


def next_rates(log: Log, start: float, **which: Any) -> Iterator[float]:
    """Yields the rates that a search lacks, until the best is bracketed."""
    while True:
        found = {r["rate"]: loss_of(r) for r in log.find(**which)}
        best = min(found, key=lambda rate: found[rate]) if found else start
        missing = [x for x in (best, best / 2, 2 * best) if x not in found]
        if not missing:
            return
        yield missing[0]


class Sweep:
    """The runs of one stage, written down one by one."""

    def __init__(self, stage: str, log: Log, work: Workload):
        """Opens the bench of the stage."""
        self.name, self.stage, self.log = stage, STAGES[stage], log
        self.bench = Bench(self.stage, work)
        self._latest: tuple[Any, Any] = (None, None)

    def trial(self, contender: Contender) -> Trial:
        """Returns the compiled trial; of others, none is needed again."""
        if self._latest[0] != contender:
            self._latest = contender, Trial(self.bench, contender)
        return self._latest[1]

    def run(
        self, name: str, contender: Contender, rate: float, seed: int, **run: float
    ) -> None:
        """Makes one run; ``run`` has its rates where they differ, and its decay."""
        trial = self.trial(contender)
        outcome = trial.run(run.pop("matrix_rate", rate), seed, **run)
        entry = {"stage": self.name, "name": name, "options": contender.options}
        entry |= {"rate": rate, "seed": seed} | self.stage._asdict()
        entry |= {"seeds": len(self.stage.seeds), "decay": run.get("decay", 0.0)}
        entry |= outcome
        sizes = trial.state_bytes()
        entry |= {f"{k}_state": sizes.get(k, 0) for k in ("matrix", "table")}
        entry |= {"jax": jax.__version__, "optax": optax.__version__}
        self.log.add(entry)

    def search(self, name: str) -> None:
        """Brackets a contender's best rate."""
        one = CONTENDERS[name]
        for rate in next_rates(self.log, one.start, stage=self.name, name=name):
            self.run(name, one, rate, 0)

    def tables(self, name: str, around: str) -> None:
        """Brackets the best rate of embedding and head beside a method's."""
        matrix_rate = best_rate(self.log, around)
        if matrix_rate is None:
            sys.exit(f"{around} has no bracketed rate yet: python -m {__spec__.name}")
        one = CONTENDERS[around]._replace(tables=name)
        label = f"{around}; tables: {name}"
        for rate in next_rates(self.log, 4 * FULL_RATE, stage=self.name, name=label):
            self.run(label, one, rate, 0, matrix_rate=matrix_rate, table_rate=rate)

    def confirm(self, name: str) -> None:
        """Makes the runs of all seeds at the best rate, and at half of it."""
        best = best_rate(self.log, name)
        if best is None:
            print(f"{name}: no bracketed rate yet", file=sys.stderr)
            return
        rates = (best, best / 2)
        if self.name == "longest" and (known := better_rate(self.log, name, "long")):
            rates = (known,)
        for seed, rate in itertools.product(self.stage.seeds, rates):
            self.once(name, rate, seed)

    def decay(self, name: str) -> None:
        """Makes the longest run with weight decay."""
        rate = better_rate(self.log, name, "longest")
        if rate is None:
            print(f"{name}: no longest run yet", file=sys.stderr)
            return
        self.once(name, rate, 0, decay=DECAY)

    def once(self, name: str, rate: float, seed: int, **run: float) -> None:
        """Makes a run unless the file has it."""
        if not self.log.find(stage=self.name, name=name, rate=rate, seed=seed):
            self.run(name, CONTENDERS[name], rate, seed, **run)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES])
    parser.add_argument("--only", nargs="*", default=["*"], help="names, * allowed")
    parser.add_argument(
        "--around", default="even muon, 8 bits", help="for stage tables"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("docs/results/tuned.jsonl")
    )
    options = parser.parse_args()
    sweep = Sweep(options.stage, Log(options.out), Workload(eval_tokens=32_768))
    for name in TABLES if options.stage == "tables" else CONTENDERS:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            continue
        if options.stage == "tables":
            sweep.tables(name, options.around)
        elif options.stage in ("search", "wide"):
            sweep.search(name)
        elif options.stage == "decay":
            sweep.decay(name)
        else:
            sweep.confirm(name)


if __name__ == "__main__":
    main()
