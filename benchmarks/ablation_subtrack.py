"""SubTrack++ taken apart on real text: ``python -m benchmarks.ablation_subtrack``.

The example's tiny LLaMA learns the sources of Python's standard library, once for each
way of putting the parts together: how the basis moves, what happens to the moments
when it does, and whether the rest of the gradient is recovered. Every low-rank row is
an ``lro.chain`` around the same Adam; all rows start from the same parameters and see
the same batches, per seed. A frozen basis is the one of the first gradient.

One learning rate serves all low-rank rows. Recovery lengthens their steps, so part of
what it gains may be learning rate: compare at several ``--lr`` before concluding.
"""

import argparse
import collections
import dataclasses
import math
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import optax

import lowrank_optax as lro
from benchmarks._runs import Workload, add_flags, run_missing
from examples.llama import optimizers
from examples.llama.config import Resolved

MOVES = {"frozen": "track", "tracked": "track", "walk": "walk", "jump": "jump"}
# Registry name and share of the preset's learning rate, which is GaLore's: AdamW does
# better at a tenth of it.
BASELINES = {
    "adamw": ("adamw", 1.0),
    "adamw-tenth": ("adamw", 0.1),
    "galore": ("galore", 1.0),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """One low-rank configuration: a choice from every column of the table."""

    basis: str
    transport: str
    recovery: str

    def build(self, config: Resolved, angle: float) -> optax.GradientTransformation:
        """Puts the parts together; no weight decay, as the preset has none."""
        gap = config.steps + 1 if self.basis == "frozen" else config.update_proj_gap
        step = angle if self.basis == "walk" else "line_search"
        move = MOVES[self.basis]
        projector = lro.grassmann(config.rank, gap, move=move, step=step)
        transport = lro.align_signs()  # "off": no moment turns
        if self.transport != "off":
            transport = lro.rotate_moments(config.b1, config.b2, self.transport)
        recovery = [lro.recover_scale()] if self.recovery == "on" else []
        bracket = lro.chain(
            lro.project(projector, transport=transport, layer_axis=0, seed=config.seed),
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            *recovery,
            lro.backproject(config.scale),
        )
        lr = optax.scale_by_learning_rate(optimizers.learning_rate(config))
        return optax.chain(bracket, lr)


def configurations() -> dict[str, Parts | None]:
    """Returns name -> parts, None for a baseline out of the trainer's registry."""
    rows = [Parts(basis, "debiased", on) for basis in MOVES for on in ("off", "on")]
    rows += [Parts("tracked", form, on) for form in ("off", "paper")
             for on in ("off", "on")]  # fmt: skip
    named: dict[str, Parts | None] = dict.fromkeys(BASELINES)
    return named | {f"{r.basis}/{r.transport}/{r.recovery}": r for r in rows}


class Experiment:
    """One run after the other on the same text."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.work = Workload(steps=options.steps, update_proj_gap=options.gap)
        self.lr = self.work.config.lr if options.lr is None else options.lr

    def settings(self) -> dict:
        """Returns what all runs of one file must have in common."""
        names = "preset steps update_proj_gap rank scale b1 b2 eps clip batch_size "
        names += "seq_len"
        return self.work.settings(names, lr=self.lr, walk_angle=self.options.angle)

    def run(self, name: str, seed: int) -> dict:
        """Trains once and returns the validation loss at the end."""
        parts, defaults = configurations()[name], self.work.config
        base, share = BASELINES.get(name, ("", 1.0))
        lr = share * (defaults.lr if base else self.lr)
        config = dataclasses.replace(defaults, optimizer=base, lr=lr, seed=seed)
        started = time.perf_counter()
        if parts is None:
            tx = optimizers.build_optimizer(config)
        else:
            tx = parts.build(config, self.options.angle)
        last = collections.deque(self.work.train(config, tx), maxlen=1).pop()
        return {
            "name": name,
            "seed": seed,
            "lr": lr,
            "val_loss": self.work.validation_loss(last.params),
            "skipped_steps": int(last.metrics["skipped"]),
            "seconds": round(time.perf_counter() - started, 1),
        }


def table(runs: list[dict]) -> str:
    """Formats all finished runs as Markdown, one row per configuration."""
    columns = "basis, transport, recovery, lr, loss, sd, perplexity, each seed"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * 8 + "|"]
    for name in configurations():
        rows = sorted((r for r in runs if r["name"] == name), key=lambda r: r["seed"])
        if rows:
            cells = *(name.split("/") if "/" in name else (name, "-", "-")), *sums(rows)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sums(rows: list[dict]) -> tuple[str, ...]:
    """Returns the cells that sum up one configuration's runs."""
    losses, lr = [row["val_loss"] for row in rows], f"{rows[0]['lr']:g}"
    each = " ".join("diverged" if x is None else f"{x:.4f}" for x in losses)
    if None in losses:
        return lr, "-", "-", "-", each
    mean = statistics.mean(losses)
    spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
    return lr, f"{mean:.4f}", spread, f"{math.exp(mean):.3f}", each


def main() -> None:
    """Runs what is missing, one line each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, steps=120, seeds=[0, 1, 2])
    parser.add_argument("--gap", type=int, default=10, help="steps between two bases")
    parser.add_argument("--lr", type=float, help="low-rank rows (default: the preset)")
    parser.add_argument("--angle", type=float, default=0.1, help="of a walk, radians")
    options = parser.parse_args()
    experiment = Experiment(options)
    settings = experiment.settings()
    print(table(run_missing(options, settings, configurations(), experiment.run)))


if __name__ == "__main__":
    main()
