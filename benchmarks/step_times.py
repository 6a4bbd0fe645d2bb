"""``measure``: the time of a step of every optimizer that is compared.

``python -m benchmarks.step_times`` adds to what its file has. Every optimizer of
``benchmarks.tuned`` but its trials updates the matrices of four layers of width 256,
update and ``optax.apply_updates`` in one program with state and parameters donated. A
row's time is the mean over one gap between two bases, so that it holds one refresh, and
the least of some rounds. optax.adamw is timed once more in every row's turn, and the
ratio of the two is written down. Processor time is counted, in one thread: it does not
grow by waiting for a processor that others use.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._contenders import CONTENDERS, GAP

WIDTH, FF_WIDTH, LAYERS = 256, 704, 4
SHAPES = dict.fromkeys("qkvo", (LAYERS, WIDTH, WIDTH)) | {
    "gate": (LAYERS, WIDTH, FF_WIDTH),
    "up": (LAYERS, WIDTH, FF_WIDTH),
    "down": (LAYERS, FF_WIDTH, WIDTH),
}


class Timed:
    """An optimizer's compiled step, with its state."""

    def __init__(self, tx: optax.GradientTransformation, gradients: Any):
        """Compiles it, and takes the first step: bases start there."""
        self.gradients = gradients
        self.params = jax.tree.map(jnp.zeros_like, gradients)
        self.state = jax.jit(tx.init)(self.params)

        def step(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = tx.update(gradients, state, params)
            updates = jax.tree.map(lambda u: 1e-3 * u, updates)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.round()

    def round(self) -> float:
        """Returns the seconds of processor time of a step, in the mean over one gap."""
        params, state = self.params, self.state
        started = time.process_time()
        for _ in range(GAP):
            params, state = self.step(params, state, self.gradients)
        jax.block_until_ready((params, state))
        self.params, self.state = params, state
        return (time.process_time() - started) / GAP


def measure(names: list[str], rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields every optimizer's milliseconds, and their ratio to optax.adamw's."""
    draw = np.random.default_rng(0)
    gradients = {
        name: jnp.asarray(draw.standard_normal(shape), jnp.float32)
        for name, shape in SHAPES.items()
    }
    adamw = Timed(CONTENDERS["optax.adamw"].build(WIDTH // 4), gradients)
    for name in names:
        one = Timed(CONTENDERS[name].build(WIDTH // 4), gradients)
        turns = [(one.round(), adamw.round()) for _ in range(rounds)]
        own, beside = (min(times) for times in zip(*turns, strict=True))
        yield name, {"ms": round(1e3 * own, 2), "over_adamw": round(own / beside, 2)}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names (default all)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("docs/results/step_times.json")
    )
    options = parser.parse_args()
    names = options.only or [
        name
        for name, one in CONTENDERS.items()
        if one.kind != "trial" and not one.whole
    ]
    steps = {}
    if options.out.exists():
        steps = json.loads(options.out.read_text())["steps"]
    setting = {"jax": jax.__version__, "platform": jax.default_backend()}
    setting |= {"width": WIDTH, "layers": LAYERS}
    for name, row in measure(names, options.rounds):
        print(name, row, flush=True)
        steps[name] = row
        # After every row, so that one that does not end loses none of the others.
        report = setting | {"steps": steps}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
