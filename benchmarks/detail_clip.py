"""GWT's details with and without a bound: ``python -m benchmarks.detail_clip``.

GWT divides the details of a gradient by the root of the second moment of its
approximation. Where the rows of a block nearly cancel the approximation is small and
the quotient has no bound. The trainer's tiny model learns real text with and without
``detail_clip``, with the trainer's warm-up and without, and with the authors'
conventions; recorded are the loss, how far a single step moved a weight of the
projected matrices, and the share of details beyond each bound in unclipped runs.
"""

import argparse
import dataclasses
import itertools
import math
import os
import statistics
import time
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from benchmarks._runs import Workload, add_flags, run_missing
from examples.llama import optimizers
from examples.llama.config import Resolved

CLIPS = {"none": math.inf, "1": 1.0, "3": 3.0, "10": 10.0, "30": 30.0}
BOUNDS = (1.0, 3.0, 10.0, 30.0, 100.0)
WARMUPS = {"warm-up": True, "no warm-up": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    conventions: str
    warmup: bool
    clip: float


def cases() -> dict[str, Case]:
    """Returns name -> case; the authors' conventions for two bounds only."""
    return {
        f"{form}/{start}/{clip}": Case(form, WARMUPS[start], CLIPS[clip])
        for form, clips in (("optax", CLIPS), ("authors", ("none", "10")))
        for start in WARMUPS
        for clip in clips
    }


class Watch(NamedTuple):
    """Of the last step."""

    count: jax.Array
    change: jax.Array  # largest magnitude
    beyond: jax.Array  # share of details beyond each of BOUNDS


def pick(tree: Any, chosen: list[bool]) -> list[jax.Array]:
    """Returns the chosen leaves."""
    return list(itertools.compress(jax.tree.leaves(tree), chosen))


def details(update: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Haar's two detail bands of ``[..., m, n]`` along m, divisible by 4."""
    *batch, m, n = update.shape
    a, b, c, d = jnp.moveaxis(update.reshape(*batch, m // 4, 4, n), -2, 0)
    fine = jnp.stack([a - b, c - d]) / math.sqrt(2.0)
    return (a + b - c - d) / 2.0, fine


def watch(config: Resolved, chosen: list[bool]) -> optax.GradientTransformation:
    """Looks at the direction of the chosen leaves, and leaves it as it is."""
    rate = optimizers.learning_rate(config)
    bounds = config.scale * jnp.asarray(BOUNDS)

    def init(params: Any) -> Watch:
        return Watch(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(len(BOUNDS)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Watch]:
        matrices = pick(updates, chosen)
        largest = jnp.stack([jnp.abs(x).max() for x in matrices]).max()
        bands = [jnp.abs(band) for x in matrices for band in details(x)]
        number = [jnp.sum(x[..., None] > bounds, range(x.ndim)) for x in bands]
        beyond = jnp.stack(number).sum(0) / sum(x.size for x in bands)
        change = jnp.asarray(rate(state.count) * largest)
        return updates, Watch(state.count + 1, change, beyond)

    return optax.GradientTransformation(init, update)


class Experiment:
    """One run after the other on the same text."""

    def __init__(self, options: argparse.Namespace):
        self.work = Workload(steps=options.steps, optimizer="gwt")
        tx = optimizers.build_optimizer(self.work.config)
        report = lro.selection_report(tx, self.work.abstract_params)
        self.chosen = [row.matrix is not None for row in report.rows]

    def settings(self) -> dict:
        """Returns what all runs of one file must have in common."""
        names = "preset steps warmup lr level scale b1 b2 clip batch_size seq_len"
        return self.work.settings(names, wavelet="haar")

    def build(self, config: Resolved, case: Case) -> optax.GradientTransformation:
        """``lro.gwt`` with a look at what the learning rate is about to multiply."""
        direction = lro.scale_by_gwt(
            config.level,
            scale=config.scale,
            b1=config.b1,
            b2=config.b2,
            detail_clip=case.clip,
            conventions=case.conventions,
            layer_axis=0,
        )
        rate = optax.scale_by_learning_rate(optimizers.learning_rate(config))
        return optax.chain(direction, watch(config, self.chosen), rate)

    def run(self, name: str, seed: int) -> dict:
        """Trains once."""
        case, config = cases()[name], self.work.config
        warmup = config.warmup if case.warmup else 0
        config = dataclasses.replace(config, warmup=warmup, seed=seed)
        started, changes, shares, step = time.perf_counter(), [], [], None
        for step in self.work.train(config, self.build(config, case)):
            changes.append(float(optax.tree.get(step.state, "change")))
            shares.append(optax.tree.get(step.state, "beyond").tolist())
        assert step is not None
        largest = max(changes)
        weights = pick(step.params, self.chosen)
        mean = [statistics.mean(share) for share in zip(*shares, strict=True)]
        return {
            "name": name,
            "seed": seed,
            "val_loss": self.work.validation_loss(step.params),
            "largest_change": digits(largest),
            "at_step": changes.index(largest) + 1,
            "largest_weight": digits(max(float(jnp.abs(x).max()) for x in weights)),
            "beyond_first": list(map(digits, shares[0])),
            "beyond_mean": list(map(digits, mean)),
            "skipped_steps": int(step.metrics["skipped"]),
            "seconds": round(time.perf_counter() - started, 1),
        }


def digits(x: float) -> float:
    """Returns four significant digits."""
    return float(f"{x:.4g}")


def table(runs: list[dict]) -> str:
    """Formats all finished runs as Markdown, one row per case."""
    columns = (
        "conventions, start, clip, loss, each seed, largest change of a weight, "
        "at step, largest weight at the end, details beyond 1 / 3 / 10 / 30 / 100"
    )
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * 9 + "|"]
    for name in cases():
        rows = sorted((r for r in runs if r["name"] == name), key=lambda r: r["seed"])
        if rows:
            lines.append("| " + " | ".join([*name.split("/"), *sums(rows)]) + " |")
    return "\n".join(lines)


def sums(rows: list[dict]) -> list[str]:
    """Returns the cells of one case: the largest, and the means, over its seeds."""
    losses = [math.inf if r["val_loss"] is None else r["val_loss"] for r in rows]
    largest = max(rows, key=lambda r: r["largest_change"])
    shares = map(statistics.mean, zip(*(r["beyond_mean"] for r in rows), strict=True))
    return [
        f"{statistics.mean(losses):.4f}",
        " ".join(f"{x:.4f}" for x in losses),
        f"{largest['largest_change']:.3g}",
        str(largest["at_step"]),
        f"{max(r['largest_weight'] for r in rows):.3g}",
        " / ".join(f"{100 * x:.2g}%" for x in shares),
    ]


def main() -> None:
    """Runs what is missing, one line each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, steps=120, seeds=[0, 1])
    options = parser.parse_args()
    experiment = Experiment(options)
    runs = run_missing(options, experiment.settings(), cases(), experiment.run)
    print(table(runs))


if __name__ == "__main__":
    main()
