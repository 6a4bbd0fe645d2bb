"""MaxText: its own training loop, with scanned layers, on fsdp x tensor devices.

Three lines to change, in `get_optimizer` of MaxText's `optimizers.py` (here put in its
place from outside):

    import lowrank_optax as lro
    numbers = get_muon_weight_dimension_numbers(model, config)
    return lro.galore(learning_rate_schedule, rank=4, weight_dimension_numbers=numbers)

Dimension numbers: those that MaxText has for Muon; its kernels of queries, keys and
values are `[embed, layers, heads, head]`, and no guess is needed. Checkpoints and
meshes: MaxText's own, from its flags.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m examples.clients.maxtext_pretrain
"""

import json
import os
import pathlib
from typing import Any
from unittest import mock

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # read when MaxText is imported

from flax import nnx
from maxtext import configs  # pyright: ignore[reportMissingImports]
from maxtext.configs import pyconfig  # pyright: ignore[reportMissingImports]
from maxtext.optimizers import optimizers  # pyright: ignore[reportMissingImports]
from maxtext.trainers.pre_train.train import (  # pyright: ignore[reportMissingImports]
    train_loop,
)
from maxtext.utils import muon_utils  # pyright: ignore[reportMissingImports]

import lowrank_optax as lro
from examples.clients import common

LAYERS = "decoder/layers"
PROJECTED = (
    *(f"{LAYERS}/mlp/{name}/kernel" for name in ("wi_0", "wi_1", "wo")),
    *(f"{LAYERS}/self_attention/{name}/kernel" for name in ("key", "out", "query")),
    f"{LAYERS}/self_attention/value/kernel",
)
# MaxText lays the state out by the names of a parameter's axes. Heads and their width
# are one axis of a matrix, and have no name together.
CUT = tuple(f"{LAYERS}/mlp/{name}/kernel" for name in ("wi_0", "wi_1", "wo"))

FLAGS = {
    "run_name": "client",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "decoder_block": "llama2",
    "scan_layers": True,
    "base_num_decoder_layers": 3,
    "base_emb_dim": common.WIDTH,
    "base_mlp_dim": common.HIDDEN,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 8,
    "vocab_size": common.VOCABULARY,
    "max_target_length": 16,
    "per_device_batch_size": 1,
    "attention": "dot_product",
    "dtype": "float32",
    "ici_fsdp_parallelism": -1,  # the devices that are left
    "ici_tensor_parallelism": 2,
    "learning_rate": 1e-2,
    "learning_rate_schedule_steps": 6,
    "warmup_steps_fraction": 0.0,
    "async_checkpointing": False,
    "enable_goodput_recording": False,
    "log_config": False,
}


def train(method: str, folder: pathlib.Path, steps: int) -> common.Run:
    """Trains to step `steps`, from the last checkpoint in `folder` if there is one."""
    reports = []

    def get_optimizer(config: Any, schedule: Any, model: Any = None) -> Any:
        numbers = muon_utils.get_muon_weight_dimension_numbers(model, config)
        tx = common.optimizer(method, schedule, weight_dimension_numbers=numbers)
        reports.append(lro.selection_report(tx, nnx.state(model, nnx.Param)))
        return tx

    metrics = folder / f"until_{steps}.jsonl"
    own = {
        "steps": steps,
        "checkpoint_period": steps,
        "base_output_directory": folder,
        "metrics_file": metrics,
    }
    base = pathlib.Path(configs.__file__).parent / "base.yml"
    words = [f"{name}={value}" for name, value in (FLAGS | own).items()]
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(optimizers, "get_optimizer", get_optimizer):
        state = train_loop(pyconfig.initialize(["train", str(base), *words]), None)
    lines = map(json.loads, metrics.read_text().splitlines())
    return common.Run(reports[0], [line["learning/loss"] for line in lines], state)


if __name__ == "__main__":
    common.main(train)
