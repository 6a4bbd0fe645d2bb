"""States in few bits against float32 on real text: ``python -m benchmarks.few_bits``.

The trainer's tiny model learns the sources of Python's standard library. Per seed all
runs start from the same parameters and see the same batches; reported is the validation
loss at the end, over that of the same method with float32 states.
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

# Learning rates as in benchmarks.loss_curves.
RATES = {
    "adamw": 0.001,
    "adamw_8bit": 0.001,
    "adamw_4bit": 0.001,
    "galore": 0.01,
    "galore, bfloat16": 0.01,
    "galore_8bit": 0.01,
    "q_galore": 0.01,
}
AGAINST = {
    "adamw_8bit": "adamw",
    "adamw_4bit": "adamw",
    "galore, bfloat16": "galore",
    "galore_8bit": "galore",
    "q_galore": "galore",
}


def experiment(work: Workload) -> Callable[[str, int], dict]:
    """Returns the function that trains once."""

    def run(name: str, seed: int) -> dict:
        # Behind the comma the dtype that moments and bases are kept in.
        optimizer, _, dtype = name.partition(", ")
        config = dataclasses.replace(
            work.config,
            optimizer=optimizer,
            lr=RATES[name],
            seed=seed,
            state_dtype=dtype or work.config.state_dtype,
        )
        tx = optimizers.build_optimizer(config)
        return {
            "name": name,
            "seed": seed,
            "lr": RATES[name],
            "state_bytes": optimizers.state_bytes(tx, work.abstract_params),
            **work.outcome(config, tx),
        }

    return run


def table(runs: list[dict]) -> str:
    """Formats all finished runs as Markdown, one row per name."""
    losses = {(run["name"], run["seed"]): run["val_loss"] for run in runs}
    lines = [
        "| optimizer | lr | state bytes | validation loss | each seed | over float32 |",
        "|---" * 6 + "|",
    ]
    for name in RATES:
        rows = sorted((r for r in runs if r["name"] == name), key=lambda r: r["seed"])
        if not rows:
            continue
        mean = statistics.mean(r["val_loss"] for r in rows)
        each = " ".join(f"{r['val_loss']:.4f}" for r in rows)
        ratios = [
            losses[name, r["seed"]] / losses[AGAINST[name], r["seed"]]
            for r in rows
            if (AGAINST.get(name), r["seed"]) in losses
        ]
        over = " ".join(f"{100 * (ratio - 1):+.2f} %" for ratio in ratios) or "-"
        lines.append(
            f"| {name} | {rows[0]['lr']:g} | {rows[0]['state_bytes']:,} | {mean:.4f} "
            f"| {each} | {over} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, one line each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, steps=300, seeds=[0, 1, 2])
    options = parser.parse_args()
    work = Workload(steps=options.steps)
    shared = "preset steps warmup final_lr rank update_proj_gap scale b1 b2 eps clip "
    shared += "batch_size seq_len eval_tokens"
    settings = work.settings(shared, lr=RATES)
    print(table(run_missing(options, settings, RATES, experiment(work))))


if __name__ == "__main__":
    main()
