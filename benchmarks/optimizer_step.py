"""One optimizer step, side by side: ``python -m benchmarks.optimizer_step``.

All peers run in one process on the same gradients and take turns, so a busy machine
slows all of them; the ratios are the result. Timed is the jitted ``tx.update`` with
its state donated, and "with apply" the update and ``optax.apply_updates`` in one
program, state and parameters donated, as a train step has them: there what is done to
the lifted matrix costs no pass of its own.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform

# Two threads for everybody, set before any numerical library is loaded. LAPACK calls
# come from XLA's own two threads, so OpenBLAS gets no more: its second pool doubled
# the power projector's refresh, and slowed the SVDs too.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import jax

from benchmarks import _peers

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 512, 1376, 8, 32000  # LLaMA-60M
MATRICES = {
    "q": (HIDDEN, HIDDEN),
    "k": (HIDDEN, HIDDEN),
    "v": (HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (HIDDEN, INTERMEDIATE),
    "up": (HIDDEN, INTERMEDIATE),
    "down": (INTERMEDIATE, HIDDEN),
}
COLUMNS = (
    "optimizer", "with apply ms", "with apply / galore", "state MiB", "temp MiB",
    "plain ms", "plain / galore", "mean / adamw", "refresh ms", "refresh / plain",
    "compile s",
)  # fmt: skip
GALORE = "lro.galore power"


def trees() -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the parameter shapes that are timed."""
    unstacked = {
        f"layer{i}/{name}": shape
        for i in range(LAYERS)
        for name, shape in MATRICES.items()
    }
    stacked = {name: (LAYERS, *shape) for name, shape in MATRICES.items()}
    whole = {
        **stacked,
        "embedding": (VOCABULARY, HIDDEN),
        "lm_head": (HIDDEN, VOCABULARY),
        "norm1": (LAYERS, HIDDEN),
        "norm2": (LAYERS, HIDDEN),
        "norm": (HIDDEN,),
    }
    return {"unstacked": unstacked, "stacked": stacked, "whole model": whole}


def run(which: str, shapes, options: argparse.Namespace) -> dict:
    """Measures all peers on one tree."""
    params = _peers.random_like(shapes, seed=0)
    gradients = _peers.random_like(shapes, seed=1)
    with_torch = which == "unstacked" and importlib.util.find_spec("galore_torch")
    builders = _peers.peers(options.rank, options.gap, bool(with_torch))
    if options.only:
        builders = {
            name: make for name, make in builders.items() if name in options.only
        }
    built = {name: make(params) for name, make in builders.items()}
    rows = _peers.measure(built, gradients, options.gap, options.steps, options.due)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"tree": which, "largest_bytes": largest, "rows": rows}


def table(result: dict) -> str:
    """Formats one tree's rows, with their ratios, as Markdown."""
    rows = {row["optimizer"]: row for row in result["rows"]}
    galore, adamw = rows.get(GALORE, {}), rows.get("optax.adamw", {})
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in result["rows"]:
        temp = row["temp_bytes"]
        cells = (
            row["optimizer"],
            f"{row['applied_ms']:.1f}" if row["applied_ms"] else "-",
            _ratio(row["applied_ms"], galore.get("applied_ms")),
            f"{row['state_bytes'] / 2**20:.1f}",
            "-" if temp is None else f"{temp / 2**20:.1f}",
            f"{row['plain_ms']:.1f}",
            _ratio(row["plain_ms"], galore.get("plain_ms")),
            _ratio(row["mean_ms"], adamw.get("mean_ms")),
            f"{row['refresh_ms']:.0f}",
            _ratio(row["refresh_ms"], row["plain_ms"]),
            f"{row['compile_s']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else "-"


def main() -> None:
    """Measures, prints the tables, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=128, help="basis vectors (paper)")
    parser.add_argument("--gap", type=int, default=200, help="steps between bases")
    parser.add_argument("--steps", type=int, default=20, help="plain steps timed")
    parser.add_argument("--due", type=int, default=3, help="refresh steps timed")
    parser.add_argument("--only", nargs="*", help="optimizers to run (default all)")
    parser.add_argument("--trees", nargs="*", default=list(trees()), help="which trees")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the JSON")
    options = parser.parse_args()
    results = []
    for which, shapes in trees().items():
        if which not in options.trees:
            continue
        results.append(run(which, shapes, options))
        print(f"\n### LLaMA-60M layer matrices, {which}, rank {options.rank}\n")
        print(table(results[-1]), flush=True)
    if options.out:
        machine = {
            "jax": jax.__version__,
            "platform": jax.default_backend(),
            "machine": platform.machine(),
            "threads": 2,
        }
        report = {"machine": machine, "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
