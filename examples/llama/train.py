"""Train a LLaMA on real text: `python -m examples.llama.train --help`.

Exit codes: 0 the run ended, or was asked to stop and saved; 1 training cannot go on;
2 the command, the data or the checkpoint needs mending (nothing was overwritten).
"""

import itertools
import pathlib
import sys
import time
from collections.abc import Sequence

import optax
import tyro

from examples.llama import optimizers
from examples.llama.batches import Cursor
from examples.llama.checkpoint import say
from examples.llama.config import TrainConfig, UsageError
from examples.llama.evaluate import Evaluation, unigram_perplexity
from examples.llama.model import count_params
from examples.llama.processes import (
    any_of,
    is_first,
    only_first_prints,
    start_processes,
)
from examples.llama.report import closing_table, readable_bytes
from examples.llama.rundir import stop_on_signals
from examples.llama.trainer import Trainer, TrainingStopped

_UNIGRAM_ROWS = 20_000


def unigram(trainer: Trainer) -> float:
    """What knowing only how frequent each token is would reach on the same text."""
    block, _ = trainer.rows(True).block(Cursor())
    rows = itertools.islice(block, _UNIGRAM_ROWS)
    vocabulary = trainer.model_config.vocab_size
    return unigram_perplexity(rows, trainer.validation, vocabulary)


def summary(
    trainer: Trainer, result: Evaluation, files: list[pathlib.Path], seconds: float
) -> str:
    """The closing table."""
    config, params = trainer.config, trainer.abstract_params
    state = optimizers.state_bytes(trainer.optimizer, params)
    adamw = optimizers.state_bytes(optax.adamw(1e-3), params)
    weights = optimizers.tree_bytes(trainer.params)
    kind = "byte" if config.tokenizer == "bytes" else "token"
    rows = [
        ("model", f"{config.preset}, {count_params(params):,} parameters"),
        (f"weights, {config.weights}", readable_bytes(weights)),
        (
            f"optimizer state, {config.optimizer}",
            f"{readable_bytes(state)} ({state / adamw:.0%} of AdamW's)",
        ),
        ("optimizer state, adamw", readable_bytes(adamw)),
        ("steps, tokens", f"{trainer.step:,}, {trainer.tokens:,}"),
        ("speed", f"{trainer.tokens_per_second():,.0f} tokens/s"),
        ("time", f"{seconds:.0f} s"),
        (
            "validation perplexity",
            f"{result.perplexity:.3f} over {result.tokens:,} tokens",
        ),
        (f"{kind}-unigram perplexity", f"{unigram(trainer):.3f} on the same tokens"),
    ]
    if config.galore_compat:
        rows.append(("as GaLore's script counts", f"{result.compat_perplexity:.3f}"))
    names = ", ".join(path.name for path in files)
    rows.append(("files", f"{trainer.run_dir}: {names}, checkpoints"))
    return closing_table(rows)


def train(config: TrainConfig) -> None:
    started = time.perf_counter()
    start_processes(config.distributed)
    with stop_on_signals() as asked, only_first_prints():
        should_stop = any_of(asked)
        trainer = Trainer(config)
        files: list[pathlib.Path] = []
        try:
            result = trainer.run(should_stop)
        finally:
            files = trainer.close()
    if not is_first():
        return
    if result is None:
        print(
            f"stopped at step {trainer.step}; saved in {trainer.run_dir}, go on with "
            "--resume",
            flush=True,
        )
    else:
        print(summary(trainer, result, files, time.perf_counter() - started))


def main(args: Sequence[str] | None = None) -> int:
    config = tyro.cli(TrainConfig, prog="python -m examples.llama.train", args=args)
    try:
        train(config)
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except TrainingStopped as error:
        say(f"stopped: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
