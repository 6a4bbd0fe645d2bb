"""What the clients share: methods, batches, the comparison of two runs."""

import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

import lowrank_optax as lro

# A new basis every second step, so that the steps after a restart find some; and eight
# bits for the moments of all matrices, however small.
METHODS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 4, "update_proj_gap": 2},
    "subtrack": {"rank": 4, "update_proj_gap": 2},
    "gwt": {"level": 2},
    "galore_8bit": {"rank": 4, "update_proj_gap": 2, "min_size": 100},
}
VOCABULARY, WIDTH, HIDDEN = 64, 16, 32
BATCH = 8


class Run(NamedTuple):
    """What a run leaves behind.

    `report` says what was projected, `losses` are those of the steps that it took
    itself, and `state` is the tree of all that it keeps: parameters and the optimizer's
    state.
    """

    report: lro.SelectionReport
    losses: list[float]
    state: Any


def optimizer(
    method: str, learning_rate: Any = 1e-2, **options: Any
) -> optax.GradientTransformation:
    """`lro.galore(1e-2, rank=4, ...)`, for any of the methods by its name."""
    return getattr(lro, method)(learning_rate, **METHODS[method], **options)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and what follows them, the next number: the same in every run."""
    tokens = np.roll(np.arange(BATCH, dtype=np.int32), step)
    return tokens, tokens + 1


def four_devices(kind: AxisType) -> Mesh:
    """Two by two devices; the axes are named for what they cut."""
    devices = jax.devices()[:4]
    return jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=devices)


def as_numpy(tree: Any) -> dict[str, np.ndarray]:
    """Every array by its path, copied, so that a later donation leaves it alone."""

    def plain(x: Any) -> np.ndarray:
        key = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if key else x)

    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): plain(x) for path, x in pairs}


def differences(one: Any, other: Any) -> list[str]:
    """Paths of the arrays whose bits, types or shapes differ."""
    left, right = as_numpy(one), as_numpy(other)
    return sorted(left.keys() ^ right.keys()) + [
        path
        for path, x in left.items()
        if path in right
        and (x.dtype, x.shape, x.tobytes())
        != (right[path].dtype, right[path].shape, right[path].tobytes())
    ]


def restarted(
    train: Callable[..., Run], method: str, **options: Any
) -> tuple[Run, list[str]]:
    """Trains six steps in one go, and three and three with a restart in between.

    Returns:
      The run in one go, and what differs in the end: nothing, if a restart leaves no
      trace.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        straight = train(method, root / "straight", 6, **options)
        train(method, root / "stopped", 3, **options)
        again = train(method, root / "stopped", 6, **options)
    changed = differences(straight.state, again.state)
    if len(again.losses) != 3:  # a run that began anew would end the same
        changed.append(f"{len(again.losses)} steps after the restart")
    return straight, changed


def main(train: Callable[..., Run], variants: Iterable[dict[str, Any]] = ({},)) -> None:
    """Tries every method, and ends with 1 if a restart changed a run."""
    failed = False
    for options in variants:
        for method in METHODS:
            run, changed = restarted(train, method, **options)
            failed |= bool(changed)
            print(f"{method} {options or ''}: loss {run.losses[0]:.3f}", end=" ")
            print(f"-> {run.losses[-1]:.3f}, restart: {changed or 'no trace'}")
    sys.exit(failed)
