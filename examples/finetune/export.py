"""`export` writes a fine-tuned model as a folder that transformers opens."""

import pathlib
from typing import Any

import jax
import numpy as np

from examples.convert import write_model
from examples.finetune.adapter import merge
from examples.llama.config import UsageError
from examples.llama.run_folder import check_writable


def check_free(folder: str) -> None:
    """Raises if the model could not be written there at the end."""
    path = pathlib.Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--export {folder} is there and not empty: give another")
    check_writable("--export", path)


def export(task: Any, trainer: Any) -> str:
    """Writes `--export`, adapters merged; returns what it is, in words."""
    config, folder = task.config, pathlib.Path(task.config.export)
    params = task.whole(trainer)
    if config.adapter:
        params = merge(params, config.lora_rank, config.lora_alpha)
    params = jax.tree.map(np.asarray, params)
    head = params.pop("classifier", None)
    write_model(folder, task.model, params, like=task.pretrained.folder)
    return str(folder) if head is None else f"{folder}, without its classifier"
