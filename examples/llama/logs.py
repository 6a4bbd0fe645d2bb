"""`open_logs` hands a run's metrics to TensorBoard or Weights & Biases, where asked.

Both are optional (the extra `logging`) and in the run's folder. What is told: every
number of a line of metrics.jsonl, and beside it tokens per second and, of devices that
say so, the most memory that was ever in use. Where there are logs, a step of a method
that projects says what share of the gradient's energy its bases hold, too (not with
--layerwise, --compressed or an estimated gradient, which have no whole one).
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from examples.llama.config import UsageError
from examples.llama.processes import is_first

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class _Log:
    """Draws the numbers of lines, and what follows from two of them."""

    _tokens = 0

    def add(self, line: dict[str, Any]) -> None:
        values = numbers(line)
        if line.get("seconds") and self._tokens:
            seen = line["tokens"] - self._tokens
            values["tokens_per_second"] = seen / line["seconds"]
        self._tokens = line.get("tokens", self._tokens)
        self.draw(values, line["step"])

    def draw(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError


class TensorBoard(_Log):
    """Event files in `tensorboard/`, by tensorboardX."""

    def __init__(self, run_dir: pathlib.Path, settings: dict[str, Any]):
        del settings
        import tensorboardX  # type: ignore

        self._writer = tensorboardX.SummaryWriter(str(run_dir / "tensorboard"))

    def draw(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB(_Log):
    """A run in `wandb/`, offline unless the environment says otherwise."""

    def __init__(self, run_dir: pathlib.Path, settings: dict[str, Any]):
        import wandb  # type: ignore

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="lowrank_optax",
            name=run_dir.name,
            dir=str(run_dir),
            config=settings,
            mode=mode,
        )

    def draw(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


LOGS = {"tensorboard": TensorBoard, "wandb": WandB}


def open_logs(
    names: Sequence[str], run_dir: pathlib.Path, settings: dict[str, Any]
) -> list[Any]:
    """The logs that `--log-to` names, in the first process.

    Raises:
        UsageError: a package is not there.
    """
    found = []
    for name in names if is_first() else ():
        try:
            found.append(LOGS[name](run_dir, settings))
        except ImportError as error:
            raise UsageError(
                f"--log-to {name} needs {PACKAGES[name]}: pip install "
                f"'lowrank-optax[logging]' ({error})"
            ) from error
    return found


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What can be drawn over steps."""
    found = {
        name: value
        for name, value in line.items()
        if name != "step" and type(value) in (int, float)
    }
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if memory is None else found | {"peak_bytes_in_use": memory}
