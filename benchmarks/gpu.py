"""Steps of LLaMA-350M's and 1B's optimizers on a GPU: ``python -m benchmarks.gpu``.

Each row is a process of its own, since a device tells the peak of its memory once per
process, and is written to the JSON as soon as it is there: the script may be stopped at
any time, and goes on with what is missing. ``--minutes`` bounds the whole. What is left
of them goes into runs of the 60M preset, AdamW against Even Muon, each for half of it.
Without a GPU, ``--dry-run`` takes shapes of a few numbers, so that every line is run.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from benchmarks._peers import JaxPeer
from examples.llama.model import abstract_model
from examples.llama.presets import PRESETS

RATE = 1e-3
RANKS = {"tiny": (32,), "350m": (256, 512), "1b": (512, 256)}
STEPS, WARM = 20, 3
# The order is that of interest: what comes late may not fit into the minutes.
Make = Callable[[int], optax.GradientTransformation]


def _low(method: Callable[..., Any]) -> Make:
    return lambda rank: method(RATE, rank=rank, layer_axis=0)


ROWS: dict[str, Make] = {
    "optax.adamw": lambda rank: optax.adamw(RATE),
    "even_muon": lambda rank: lro.even_muon(RATE, layer_axis=0),
    "galore": _low(lro.galore),
    "subtrack": _low(lro.subtrack),
    "gwt": lambda rank: lro.gwt(RATE, layer_axis=0),
    "galore_8bit": _low(lro.galore_8bit),
    "adamw_8bit": lambda rank: lro.adamw_8bit(RATE),
    "muon, 8-bit": lambda rank: lro.muon(RATE, bits=8, layer_axis=0),
    "optax.contrib.muon": lambda rank: optax.contrib.muon(RATE),
    "optax.adafactor": lambda rank: optax.adafactor(RATE),
    "optax.contrib.galore": lambda rank: optax.contrib.galore(RATE, rank=rank),
    "subtrack, 8-bit": lambda rank: lro.chain(
        lro.project(lro.grassmann(rank), layer_axis=0, transport=lro.rotate_moments()),
        lro.quantize_state(optax.scale_by_adam()),
        lro.recover_scale(),
        lro.backproject(0.25, RATE),
    ),
}


def parameters(preset: str, separate: bool) -> Any:
    """Returns random bfloat16 parameters; layers are stacked unless kept separate.

    Optax's own matrix methods take matrices, so theirs are separate.
    """
    model = dataclasses.replace(PRESETS[preset].model, param_dtype="bfloat16")
    shapes = abstract_model(model)[1]
    if separate:
        shapes = dict(shapes)
        layers = shapes.pop("layers")
        for i in range(model.layers):
            shapes[f"layer{i}"] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers
            )
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    @jax.jit
    def draw(keys: Any) -> list[jax.Array]:
        return [
            (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]

    return jax.tree.unflatten(treedef, draw(keys))


def measure(preset: str, rank: int, name: str) -> dict[str, Any]:
    """Returns one row: milliseconds of a step and bytes on the device."""
    params = parameters(preset, separate=name.startswith("optax.contrib"))
    gradients = jax.tree.map(lambda p: p * jnp.asarray(1e-3, p.dtype), params)
    peer = JaxPeer(ROWS[name](rank), params)
    row: dict[str, Any] = {
        "state_bytes": peer.state_bytes,
        "temp_bytes": peer.temp_bytes,
        "compile_s": round(peer.compile_seconds, 2),
        "cold_ms": 1e3 * peer.step(gradients),
    }
    for kind, take in (("bare", peer.step), ("with_apply", peer.apply)):
        times = sorted(take(gradients) for _ in range(WARM + STEPS))
        row[f"{kind}_ms"] = 1e3 * times[len(times) // 2]
    stats = jax.local_devices()[0].memory_stats() or {}
    row["peak_bytes"] = stats.get("peak_bytes_in_use")
    return row


def child(arguments: list[str], seconds: float) -> str | None:
    """Returns what a process of this module printed last, or None with a line why."""
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{' '.join(arguments)}: the minutes are over", flush=True)
        return None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        print(f"{' '.join(arguments)}: {last}", flush=True)
        return None
    return done.stdout.strip().splitlines()[-1]


def train(optimizer: str, seconds: float, dry: bool) -> list[list[float]]:
    """Returns (step, loss) pairs of a run that is stopped after these seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "examples.llama.train"]
        command += ["--preset", "tiny" if dry else "60m", "--optimizer", optimizer]
        command += ["--run-dir", str(run), "--keep", "1"]
        if dry:
            command += ["--steps", "3", "--eval-tokens", "2048"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # saves and ends
            process.wait()
        log = run / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        found = [json.loads(line) for line in lines]
    return [[row["step"], row["loss"]] for row in found if "loss" in row]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Formats the rows as Markdown, times over AdamW's at the same shapes."""
    lines = [
        "| model, rank, optimizer | step ms | over adamw | with apply | over adamw "
        "| state MiB | peak MiB |",
        "|---" * 7 + "|",
    ]
    for key, row in rows.items():
        preset, rank, _ = key.split("/", 2)
        adamw = rows.get(f"{preset}/{rank}/optax.adamw", {})

        def over(kind: str, row: Any = row, adamw: Any = adamw) -> str:
            return f"{row[kind] / adamw[kind]:.2f}" if kind in adamw else "-"

        peak = row["peak_bytes"]
        lines.append(
            f"| {key.replace('/', ', ')} | {row['bare_ms']:.2f} | {over('bare_ms')} "
            f"| {row['with_apply_ms']:.2f} | {over('with_apply_ms')} "
            f"| {row['state_bytes'] / 2**20:,.0f} "
            f"| {'-' if peak is None else f'{peak / 2**20:,.0f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table and writes the JSON as it goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=pathlib.Path, default="gpu.json")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, any device"
    )
    parser.add_argument("--row", nargs=3, metavar=("PRESET", "RANK", "NAME"))
    options = parser.parse_args()
    if options.row:
        preset, rank, name = options.row
        print(json.dumps(measure(preset, int(rank), name)))
        return
    end = time.monotonic() + 60 * options.minutes
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = found.setdefault("rows", {})
    presets = ["tiny"] if options.dry_run else ["1b", "350m"]
    wanted = [(p, RANKS[p][0], name) for p in presets for name in ROWS]
    wanted += [(p, r, name) for p in presets for r in RANKS[p][1:] for name in ROWS]

    def save() -> None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    training = 60 * options.minutes / 3  # left for the runs
    for preset, rank, name in wanted:
        key = f"{preset}/{rank}/{name}"
        left = end - training - time.monotonic()
        if key in rows or left < 10:
            continue
        said = child(["--row", preset, str(rank), name], left)
        if said:
            rows[key] = json.loads(said)
            save()
            print(f"{key}: {rows[key]['bare_ms']:.2f} ms", flush=True)
    for optimizer in ("adamw", "even_muon"):
        left = end - time.monotonic()
        share = left / 2 if optimizer == "adamw" else left
        if optimizer not in found.setdefault("losses", {}) and share > 20:
            found["losses"][optimizer] = train(optimizer, share, options.dry_run)
            save()
    # Asked last: whoever holds a device keeps it from the processes of the rows.
    device = jax.local_devices()[0]
    found["machine"] = {"jax": jax.__version__, "device": device.device_kind}
    save()
    print(table(rows))


if __name__ == "__main__":
    main()
