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
    """Writes `--export`, adapters merged; returns what it is, in words.

    A classifier is one of transformers' where they have such a class: on a decoder's
    last position, or on BERT's pooler. Else its head is an own file beside the encoder.
    """
    config, folder = task.config, pathlib.Path(task.config.export)
    params = task.whole(trainer)
    if config.adapter:
        params = merge(params, config.lora_rank, config.lora_alpha)
    params = jax.tree.map(np.asarray, params)
    head = params.pop("classifier", None)
    like = task.pretrained.folder
    if head is None:
        write_model(folder, task.model, params, like)
        return str(folder)
    if not task.pretrained.encoder:
        tensors = {"score.weight": head["kernel"].T}
    elif task.classifier.pooler:
        tensors = {"classifier.weight": head["kernel"].T}
        tensors["classifier.bias"] = head["bias"]
    else:
        write_model(folder, task.model, params, like)
        float32 = {name: x.astype(np.float32) for name, x in head.items()}
        np.savez(folder / "classifier.npz", **float32)
        return f"{folder}, its head in classifier.npz"
    labels = task.classes or ("value",)
    write_model(folder, task.model, params, like, head=tensors, labels=labels)
    return f"{folder}, a classifier"
