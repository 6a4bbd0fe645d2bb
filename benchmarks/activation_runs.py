"""Training under an activation budget: ``python -m benchmarks.activation_runs``.

The trainer's tiny model learns the sources of Python's standard library with GaLore, as
it is and under plans for parts of what keeping every tagged value takes. Per seed all
runs start from the same parameters and see the same batches.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks._runs import Workload, add_flags, run_missing
from examples.llama import optimizers
from examples.llama.plan_layers import plan_layers, wrap_with

BUDGETS = {"all": "", "30 %": "30%", "10 %": "10%"}


def experiment(work: Workload) -> Callable[[str, int], dict]:
    """Returns the function that trains once."""

    def run(name: str, seed: int) -> dict:
        config = dataclasses.replace(
            work.config, seed=seed, activation_budget=BUDGETS[name]
        )
        tx = optimizers.build_optimizer(config)
        plan = plan_layers(config, work.model) if BUDGETS[name] else None
        wrap_layer = None if plan is None else wrap_with(plan)
        return {
            "name": name,
            "seed": seed,
            "policy": "" if plan is None else str(plan.segments[0].policy),
            **work.outcome(config, tx, wrap_layer),
        }

    return run


def table(runs: list[dict]) -> str:
    """Formats all finished runs as Markdown, one row per budget."""
    losses = {(run["name"], run["seed"]): run["val_loss"] for run in runs}
    lines = [
        "| budget | validation loss | each seed | over all kept | kept |",
        "|---" * 5 + "|",
    ]
    for name in BUDGETS:
        rows = sorted((r for r in runs if r["name"] == name), key=lambda r: r["seed"])
        if not rows:
            continue
        mean = statistics.mean(r["val_loss"] for r in rows)
        each = " ".join(f"{r['val_loss']:.4f}" for r in rows)
        ratios = [
            losses[name, r["seed"]] / losses["all", r["seed"]]
            for r in rows
            if ("all", r["seed"]) in losses and name != "all"
        ]
        over = " ".join(f"{100 * (ratio - 1):+.2f} %" for ratio in ratios)
        policy = rows[0]["policy"] or "everything, no policy"
        lines.append(f"| {name} | {mean:.4f} | {each} | {over} | {policy} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, one line each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, steps=300, seeds=[0, 1, 2])
    options = parser.parse_args()
    work = Workload(steps=options.steps, optimizer="galore")
    shared = "preset optimizer lr steps warmup final_lr rank update_proj_gap scale "
    shared += "b1 b2 eps clip batch_size seq_len eval_tokens"
    settings = work.settings(shared)
    print(table(run_missing(options, settings, BUDGETS, experiment(work))))


if __name__ == "__main__":
    main()
