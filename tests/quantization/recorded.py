"""Recorded codes: small excerpts in the data folder, all of them in GOLDEN_DIR."""

import os
import pathlib

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"


def arrays(name):
    """The arrays of a file of this name, those in GOLDEN_DIR over the excerpt's."""
    folders = [DATA]
    if extra := os.environ.get("GOLDEN_DIR"):
        folders.append(pathlib.Path(extra))
    found = {}
    for folder in folders:
        if (folder / name).is_file():
            with np.load(folder / name) as stored:
                found |= {key: stored[key] for key in stored.files}
    return found


MAPS = arrays("quant8_blockwise.npz")
GROUPS = arrays("q_galore_parts.npz")
WEIGHTS = arrays("flash_weight_split.npz")
MOMENTS = arrays("flash_companding.npz")
STEPS = arrays("flash_adamw_bf16_24bit.npz")
