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

BUDGETS = {"all": "", "30 %": "30%", "10 %": "10%"}


def experiment(work: Workload) -> Callable[[str, int], dict]:
    """Returns the function that trains once."""

    def run(name: str, seed: int) -> dict:
        config = dataclasses.replace(
            work.config, seed=seed, activation_budget=BUDGETS[name]
        )
        decisions: list[dict] = []
        tx = optimizers.build_optimizer(config)
        outcome = work.outcome(config, tx, decisions.append)
        used = [d for d in decisions if d["activation_plan"] in ("planned", "swapped")]
        return {
            "name": name,
            "seed": seed,
            "policy": used[-1]["policies"][0][1] if used else "",
            "plans": len(used),
            **outcome,
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
    parser.add_argument("--error", type=float, default=0.05, help="--activation-error")
    parser.add_argument("--replan", type=int, default=100, help="--replan-every")
    options = parser.parse_args()
    work = Workload(
        steps=options.steps,
        optimizer="galore",
        activation_error=options.error,
        replan_every=options.replan,
    )
    shared = "preset optimizer lr steps warmup final_lr rank update_proj_gap scale "
    shared += (
        "b1 b2 eps clip batch_size seq_len eval_tokens activation_error replan_every"
    )
    settings = work.settings(shared)
    print(table(run_missing(options, settings, BUDGETS, experiment(work))))


if __name__ == "__main__":
    main()
