"""What a run says of itself when it starts, and leaves in its folder."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import optax
from jax.sharding import Mesh

import lowrank_optax as lro
from examples.llama.config import Resolved
from examples.llama.corpus import Corpus
from examples.llama.mesh import whole_axes
from examples.llama.model import count_params
from examples.llama.processes import is_first
from examples.llama.tokenizer import write_whole


def describe(
    config: Resolved,
    run_dir: pathlib.Path,
    optimizer: optax.GradientTransformation,
    params: Any,
    corpus: Corpus,
    mesh: Mesh | None,
) -> None:
    """Says what is about to run, and leaves the particulars in its folder."""
    print(
        f"{config.preset} ({count_params(params):,} parameters) with "
        f"{config.optimizer}; corpus {corpus.name}: {len(corpus.paths)} "
        f"shards, hash {corpus.fingerprint()}; writing to {run_dir}",
        flush=True,
    )
    if mesh is not None:
        print(f"mesh {config.mesh}", *whole_axes(mesh, params), sep="\n", flush=True)
    if not is_first():
        return
    if config.compressed:
        report = lro.distributed.traffic_report(optimizer, params)
        print(f"gradients: {str(report).splitlines()[-1]}", flush=True)
        write_whole(run_dir / "traffic.txt", f"{report}\n")
    settings = json.dumps(dataclasses.asdict(config), indent=1)
    write_whole(run_dir / "config.json", settings + "\n")
    with contextlib.suppress(ValueError):  # an optimizer without a bracket
        selection = lro.selection_report(optimizer, params)
        write_whole(run_dir / "selection.txt", f"{selection}\n")


def say_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Names the settings in which a resumed run differs from what was saved."""
    free = {"resume", "run_dir", "stop_step", "cache_dir"}
    changed = [
        f"{name}: {before.get(name)}, now {value}"
        for name, value in now.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        print("changed since the run began: " + "; ".join(changed), flush=True)
