"""`launch` starts the trainer in processes of its own, to be killed and disturbed.

`python -m tests.runs FLAGS` is the trainer with the preset `micro`, which trains in
seconds: `tests/storm.py` and `tests/faults.py` run it.
"""

import hashlib
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
EVERY = 5  # steps between two checkpoints


def main() -> int:
    from examples.llama.interrupt import end_at_once

    signal.signal(signal.SIGINT, end_at_once)  # as the trainer's own first lines do
    from examples.llama import presets, train
    from examples.llama.model import ModelConfig

    recipe = presets.Recipe(
        steps=200, rank=8, update_proj_gap=7, seq_len=16, batch_size=8,
        micro_batches=1, clip=1.0, tokenizer="bytes", packing="packed",
        dtype="float32", eval_every=50, eval_tokens=300, eval_batch_size=6,
        checkpoint_every=EVERY,
    )  # fmt: skip
    model = ModelConfig(vocab_size=264, width=32, ff_width=48, layers=2, heads=2)
    presets.PRESETS["micro"] = presets.Preset(model, recipe)
    return train.main(["--preset", "micro", *sys.argv[1:]])


def text(folder: pathlib.Path) -> str:
    """A small corpus in the folder; the glob that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        path = folder / f"{shard}.txt"
        if path.exists():
            continue
        lines = (f"line {i * 7919 % 1000} of shard {shard}\n" for i in range(4000))
        path.write_text("".join(lines))
    return str(folder / "*.txt")


def launch(
    work: pathlib.Path,
    run_dir: pathlib.Path,
    *flags: str,
    processes: int = 1,
    largest: int | None = None,
) -> list[subprocess.Popen]:
    """The processes of one run, with their outputs in one pipe each.

    No file that they write may have more than `largest` bytes.
    """
    command = [sys.executable, "-m", "tests.runs", "--data", text(work / "text")]
    command += ["--run-dir", str(run_dir), *flags]
    command += ["--compilation-cache", str(work / "programs")]
    command += ["--cache-dir", str(work / "cache")]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={processes}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    started = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    for index in range(processes):
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        if largest is not None:  # from here, since a fork beside JAX's threads may hang
            limits = largest, resource.RLIM_INFINITY
            resource.prlimit(started[-1].pid, resource.RLIMIT_FSIZE, limits)
    return started


def end(started: list[subprocess.Popen], patience: float) -> list[tuple[int, str]]:
    """Exit codes and outputs; who has not ended in so many seconds is killed."""
    ended = []
    for process in started:
        try:
            output, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
        ended.append((process.returncode, output))
    return ended


def last_step(run_dir: pathlib.Path) -> int:
    """The newest step in the log; 0 before there is one."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(x)["step"] for x in lines), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def fingerprint(run_dir: pathlib.Path) -> str:
    """Of all bits of the newest checkpoint's arrays, and of all that was logged."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from examples.llama.checkpoint import Store

    step, problems = Store(run_dir).newest_good()
    if problems:
        raise AssertionError(f"damaged at the end: {problems}")
    folder = (run_dir / "checkpoints" / str(step)).absolute()
    # On one device, whatever it was saved from.
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved
        )
        state = checkpointer.restore(folder, target)
    digest = hashlib.sha256(str(step).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        leaf = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode()
        )
        digest.update(leaf.tobytes())
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        logged = {k: v for k, v in json.loads(line).items() if k != "seconds"}
        digest.update(json.dumps(logged, sort_keys=True).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
