"""Loss curves on real text at equal steps: ``python -m benchmarks.loss_curves``.

The trainer's tiny model learns the sources of Python's standard library with AdamW,
GaLore, GWT, GWT's variants, and Fira and SubTrack++ with the bound of their recovery's
entries and without it. Per seed all start from the same parameters and see the
same batches. The file holds the training loss of every step and the validation loss at
every fiftieth; the picture shows the first three, or --curves, in the mean over seeds.
"""

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import optax

import lowrank_optax as lro
from benchmarks._runs import Workload, add_flags, run_missing
from examples.llama import optimizers
from examples.llama.config import Resolved

# AdamW does better at a tenth of the preset's learning rate, which is GaLore's.
RATES = {"adamw": 0.001, "galore": 0.01, "gwt": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "gwt-level1": {"level": 1},
    "gwt-level3": {"level": 3},
    "gwt-db2": {"wavelet": "db2"},
    "gwt-clip3": {"detail_clip": 3.0},
    "gwt-unbounded": {"detail_clip": math.inf},
    "gwt-unbounded-16th": {"detail_clip": math.inf, "scale": 0.0625},
    "gwt-authors": {"conventions": "authors"},
    "gwt-no-details": {},
}
# Whether the bound that a hard matrix needs costs anything on text.
BOUNDS: dict[str, dict[str, Any]] = {
    "fira": {},
    "fira-unbounded": {"entry_limit": None},
    "subtrack": {},
    "subtrack-unbounded": {"entry_limit": None},
}
EVERY, SMOOTH = 50, 20  # steps between validations, and in a mean of the picture
COLORS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#997700")
LABELS = {"adamw": "AdamW", "galore": "GaLore", "gwt": "GWT"}


def build(name: str, config: Resolved) -> optax.GradientTransformation:
    """Returns the trainer's optimizer, or a variant of its GWT."""
    if name in RATES:
        return optimizers.build_optimizer(config)
    rate, scale = optimizers.learning_rate(config), config.scale
    if name == "gwt-no-details":
        bracket = lro.chain(
            lro.project(lro.wavelet(config.level), layer_axis=0),
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            lro.backproject(scale),
        )
        return optax.chain(bracket, optax.scale_by_learning_rate(rate))
    if name in BOUNDS:
        return getattr(lro, config.optimizer)(
            rate,
            update_proj_gap=config.update_proj_gap,
            **optimizers.low_rank(config),
            **BOUNDS[name],
        )
    options = {"level": config.level, "scale": scale} | VARIANTS[name]
    return lro.gwt(rate, b1=config.b1, b2=config.b2, layer_axis=0, **options)


def experiment(work: Workload, rates: dict[str, float]) -> Callable[[str, int], dict]:
    """Returns the function that trains once."""
    evaluated = {*range(EVERY, work.config.steps, EVERY), work.config.steps}

    def run(name: str, seed: int) -> dict:
        base = name if name in RATES else name.split("-")[0]
        config = dataclasses.replace(
            work.config, optimizer=base, lr=rates[name], seed=seed
        )
        tx, started = build(name, config), time.perf_counter()
        losses, steps, validation, skipped = [], [], [], 0
        for step in work.train(config, tx):
            losses.append(rounded(step.metrics["loss"].item()))
            skipped = step.metrics["skipped"]
            if step.number in evaluated:
                steps.append(step.number)
                validation.append(rounded(work.validation_loss(step.params)))
        return {
            "name": name,
            "seed": seed,
            "lr": rates[name],
            "val_loss": validation[-1],
            "train_losses": losses,
            "val_steps": steps,
            "val_losses": validation,
            "state_bytes": optimizers.state_bytes(tx, work.abstract_params),
            "skipped_steps": int(skipped),
            "seconds": round(time.perf_counter() - started, 1),
        }

    return run


def rounded(loss: float | None) -> float | None:
    """Returns five decimals, or None for what is not finite."""
    return round(loss, 5) if loss is not None and math.isfinite(loss) else None


def mean_over_seeds(rows: list[dict], key: str) -> np.ndarray:
    """Returns the mean of one list of every run; not a number where one diverged."""
    return np.mean([[math.nan if x is None else x for x in r[key]] for r in rows], 0)


def draw(runs: list[dict], names: list[str], path: pathlib.Path) -> None:
    """Training losses as lines, each the mean of the last steps; validation on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, lowest = figure.subplots(), math.inf
    for name, color in zip(names, itertools.cycle(COLORS), strict=False):
        rows = [r for r in runs if r["name"] == name]
        if not rows:
            continue
        train = mean_over_seeds(rows, "train_losses")
        val = mean_over_seeds(rows, "val_losses")
        width = min(SMOOTH, len(train))
        smooth = np.convolve(train, np.full(width, 1 / width), "valid")
        steps = np.arange(width, len(train) + 1)
        label = f"{LABELS.get(name, name)}, lr {rows[0]['lr']:g}: {val[-1]:.3f}"
        axes.plot(steps, smooth, color=color, linewidth=1, alpha=0.8)
        axes.plot(rows[0]["val_steps"], val, "o", color=color, ms=5, label=label)
        lowest = min(lowest, np.nanmin(smooth), np.nanmin(val))
    # The fall from the start, 5.6, would leave no room for the differences at the end.
    axes.set_ylim(lowest - 0.1, max(3.2, lowest + 0.5))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per byte")
    axes.legend(title="points: validation, and at the end")
    axes.set_title(f"lines: training, mean of the last {SMOOTH} steps", fontsize=10)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(runs: list[dict], names: list[str]) -> str:
    """Formats all finished runs as Markdown, one row per name."""
    lines = [
        "| optimizer | lr | state bytes | validation loss | perplexity | each seed |",
        "|---" * 6 + "|",
    ]
    for name in names:
        rows = sorted((r for r in runs if r["name"] == name), key=lambda r: r["seed"])
        if not rows:
            continue
        losses = [math.inf if r["val_loss"] is None else r["val_loss"] for r in rows]
        mean, each = statistics.mean(losses), " ".join(f"{x:.4f}" for x in losses)
        lines.append(
            f"| {name} | {rows[0]['lr']:g} | {rows[0]['state_bytes']:,} | {mean:.4f} "
            f"| {math.exp(mean):.3f} | {each} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, one line each, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, steps=400, seeds=[0])
    parser.add_argument(
        "--lr", nargs="*", default=[], metavar="NAME=LR", help="e.g. gwt=0.003"
    )
    parser.add_argument("--picture", type=pathlib.Path, help="PNG to write")
    parser.add_argument("--curves", nargs="*", default=list(RATES), metavar="NAME")
    options = parser.parse_args()
    names = [*RATES, *VARIANTS, *BOUNDS]
    given = dict(item.split("=", 1) for item in options.lr)
    if unknown := set(given) - set(names):
        parser.error(f"--lr knows {', '.join(names)}; got {', '.join(unknown)}")
    rates = RATES | {name: float(lr) for name, lr in given.items()}
    work = Workload(steps=options.steps)
    shared = "preset steps warmup final_lr rank level update_proj_gap scale b1 b2 eps "
    shared += "clip batch_size seq_len eval_tokens"
    settings = work.settings(shared, lr=rates)
    rates = dict.fromkeys([*VARIANTS, *BOUNDS], rates["gwt"]) | rates
    runs = run_missing(options, settings, names, experiment(work, rates))
    print(table(runs, names))
    if options.picture:
        draw(runs, options.curves, options.picture)


if __name__ == "__main__":
    main()
