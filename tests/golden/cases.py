"""Recorded trajectories: files of numbers, one case each, and how they are read."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"

# What every config says about its recording, and what no replay depends on.
_COMMON = {"method", "steps", "gradients", "recorded_steps"}
_REMARKS = set("seed note source torch commit case what package repo pywt".split())


class Config:
    """The hyperparameters of a case; whoever builds its method must use them all."""

    def __init__(self, entries: dict[str, Any]):
        self._entries = entries
        self._used = _COMMON | _REMARKS

    def __getitem__(self, key: str) -> Any:
        self._used = self._used | {key}
        return self._entries[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._entries else default

    def check_all_used(self) -> None:
        unused = sorted(set(self._entries) - self._used)
        if unused:
            named = ", ".join(f"{key}={self._entries[key]!r}" for key in unused)
            raise ValueError(f"The replay does not know what to do with {named}.")


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded run.

    Attributes:
      method: the method's name, the key into the registry.
      config: its hyperparameters.
      arrays: the file's arrays.
      gradients: per parameter the gradients of all steps.
    """

    method: str
    config: Config
    arrays: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    @property
    def recorded_steps(self) -> list[int]:
        return [int(step) for step in self.config["recorded_steps"]]

    @property
    def names(self) -> list[str]:
        return [key[len("params_") :] for key in self.arrays if key[:7] == "params_"]

    def params(self, name: str) -> np.ndarray:
        """The parameter at every recorded step, the first of which is 0."""
        return self.arrays[f"params_{name}"]


def folders() -> list[pathlib.Path]:
    """Where case files are looked for."""
    extra = os.environ.get("GOLDEN_DIR")
    if not extra:
        return [DATA]
    folder = pathlib.Path(extra)
    if not folder.is_dir():
        raise FileNotFoundError(f"GOLDEN_DIR names no folder: {extra}")
    return [DATA, folder]


def files() -> list[pathlib.Path]:
    """Every different file, by name; the same file in two folders counts once."""
    found = {}
    for folder in folders():
        for path in sorted(folder.glob("*.npz")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.setdefault((path.name, digest), path)
    return [found[key] for key in sorted(found)]


def read_config(path: pathlib.Path) -> dict[str, Any] | None:
    """The file's config, or None if it is not a case but somebody's gradients."""
    with np.load(path) as arrays:
        return json.loads(str(arrays["config"])) if "config" in arrays else None


def method_of(path: pathlib.Path, config: dict[str, Any]) -> str:
    """The method a case records; some families name it in the file name alone."""
    return config.get("method") or path.stem.split("_")[0]


def load(path: pathlib.Path) -> Case:
    """Reads a case and its gradients."""
    config = read_config(path)
    assert config is not None, f"{path} is no case"
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "config"}
    with np.load(find_gradients(config["gradients"], path.parent)) as stored:
        gradients = {key: stored[key] for key in stored.files}
    return Case(method_of(path, config), Config(config), arrays, gradients)


def find_gradients(name: str, beside: pathlib.Path) -> pathlib.Path:
    """Finds a gradient file beside its case, in DATA, or in GRADIENTS_DIR."""
    places = [beside, DATA]
    if "GRADIENTS_DIR" in os.environ:
        places.append(pathlib.Path(os.environ["GRADIENTS_DIR"]))
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = ", ".join(map(str, places))
    raise FileNotFoundError(
        f"The gradient file {name} is in none of {looked}. Name its folder in "
        "GRADIENTS_DIR."
    )
