"""`compare` fine-tunes one model by many methods, and prints a table of them.

Every run is one of `python -m examples.finetune`, with the flags that its method says.
"""

import contextlib
import dataclasses
import io
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from examples.finetune.config import FinetuneConfig
from examples.finetune.tasks import make_task
from examples.llama import optimizers
from examples.llama.command_line import parsed
from examples.llama.config import UsageError
from examples.llama.model import count_params
from examples.llama.report import readable_bytes
from examples.llama.run_folder import say
from examples.llama.train import Trainer, TrainingStopped

Run = dict[str, Any]
CODES = {0: "all runs ended", 2: "the command or the data needs mending"}
METRIC = "accuracy"


class Method(NamedTuple):
    """Flags, and the learning rate in the middle of those to try."""

    flags: dict[str, Any]
    lr: float


def low_rank(optimizer: str, rank: int = 4, **flags: Any) -> dict[str, Any]:
    """The tables of tokens and positions stay, as under LoRA."""
    return {"optimizer": optimizer, "rank": rank, "embeddings": "frozen", **flags}


PROBE = {"optimizer": "adamw", "embeddings": "frozen", "layers": "frozen"}
LORA = {"optimizer": "adamw", "adapter": "lora", "lora_rank": 4, "lora_alpha": 8.0}
MEZO = {"optimizer": "sgd", "gradient": "mezo", "embeddings": "frozen"}
METHODS: dict[str, Method] = {
    "linear probe": Method(PROBE, 1e-2),
    "AdamW": Method({"optimizer": "adamw"}, 3e-4),
    "AdamW, frozen embeddings": Method(low_rank("adamw"), 1e-3),
    "8-bit AdamW, frozen embeddings": Method(low_rank("adamw_8bit"), 1e-3),
    "LoRA r4": Method(LORA, 3e-3),
    "GaLore r4": Method(low_rank("galore", scale=1.0), 1e-3),
    "GaLore r8": Method(low_rank("galore", 8, scale=1.0), 1e-3),
    "GaLore r8, all projected": Method(
        low_rank("galore", 8, scale=1.0) | {"embeddings": "projected"}, 1e-3
    ),
    "SubTrack++ r4": Method(low_rank("subtrack", scale=1.0), 1e-3),
    "Online Subspace Descent r4": Method(
        low_rank("online_subspace_descent", scale=1.0), 1e-3
    ),
    "APOLLO-Mini": Method(low_rank("apollo_mini", 1), 1e-3),
    "GWT, level 2": Method(low_rank("gwt", level=2, scale=1.0), 1e-3),
    "MeZO": Method(MEZO, 1e-3),
}
# What `make finetune` shows.
SHORT = (
    "linear probe",
    "AdamW",
    "AdamW, frozen embeddings",
    "8-bit AdamW, frozen embeddings",
    "LoRA r4",
    "GaLore r4",
    "SubTrack++ r4",
    "GWT, level 2",
)


def fine_tune(config: FinetuneConfig) -> Run:
    """One run; its folder is gone when it ends.

    A run that diverges has no scores.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, run_dir=f"{folder}/run")
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(config, make_task=make_task)
            try:
                dev = trainer.run(lambda: False)
                test: Any = trainer.task.scores("test", trainer.measure)  # type: ignore
            except TrainingStopped:
                dev = test = None
            finally:
                trainer.close()
    params, steps = trainer.abstract_params, trainer.step
    return {
        "dev": dev and dev.line(),
        "test": test and test.line(),
        "trained": count_params(params),
        "state_bytes": optimizers.state_bytes(trainer.optimizer, params),
        "peak_bytes": trainer.peak_bytes,
        "steps": steps,
        "step_seconds": trainer.timed_seconds / max(steps - 1, 1),
        "seconds": time.perf_counter() - started,
    }


def score(run: Run, part: str, metric: str) -> float:
    """Of a run; one that diverged is the worst."""
    return float((run[part] or {}).get(f"val_{metric}", "-inf"))


def table(
    runs: Iterable[Run], metric: str, reference: str = "AdamW, frozen embeddings"
) -> str:
    """Markdown: means over seeds at the learning rate that is best on `dev`."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run["name"], []).append(run)
    best = {name: chosen(own, metric) for name, own in by_name.items()}
    base = [r["step_seconds"] for r in best.get(reference, [])]
    unit = statistics.median(base) if base else None
    lines = [
        f"| method | lr | dev {metric} | test {metric} | trained | state | peak | "
        "step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in best.items():
        seconds = statistics.median(r["step_seconds"] for r in own)
        first = own[0]
        cells = [
            name,
            f"{first['lr']:.2g}",
            *(mean([score(r, part, metric) for r in own]) for part in ("dev", "test")),
            f"{first['trained']:,}",
            readable_bytes(first["state_bytes"]),
            readable_bytes(first["peak_bytes"]),
            f"{seconds / unit:.2f}" if unit else f"{seconds:.3f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen(runs: Sequence[Run], metric: str) -> list[Run]:
    """The runs at the learning rate whose first seed is the best on `dev`."""
    seed = min(run["seed"] for run in runs)
    first = [run for run in runs if run["seed"] == seed]
    lr = max(first, key=lambda run: score(run, "dev", metric))["lr"]
    return [run for run in runs if run["lr"] == lr]


def mean(values: Sequence[float]) -> str:
    """With its standard deviation, where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def compare(
    config: FinetuneConfig,
    names: Sequence[str],
    rates: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0,),
    done: Sequence[Run] = (),
    add: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """All runs: the first seed at every rate, the others at the one that is best then.

    `rates` multiply a method's own learning rate; `done` are not made again, and `add`
    is told every new one.
    """
    runs = list(done)

    def run(name: str, lr: float, seed: int) -> None:
        if any((r["name"], r["lr"], r["seed"]) == (name, lr, seed) for r in runs):
            return
        flags = METHODS[name].flags | {"lr": lr, "seed": seed}
        found = fine_tune(dataclasses.replace(config, **flags))
        found = {"name": name, "lr": lr, "seed": seed} | found
        runs.append(found)
        add(found)
        say(
            f"{name}, lr {lr:.2g}, seed {seed}: dev {score(found, 'dev', METRIC):.3f}, "
            f"test {score(found, 'test', METRIC):.3f}, {found['seconds']:.0f} s"
        )

    for name in names:
        for rate in rates:
            run(name, METHODS[name].lr * rate, seeds[0])
    for seed in seeds[1:]:
        for name in names:
            own = [r for r in runs if r["name"] == name]
            run(name, chosen(own, METRIC)[0]["lr"], seed)
    return runs


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Fine-tune an encoder by several methods, one after another."""

    model: str
    """folder of the model"""
    data: str
    """labelled rows with a part `test`"""
    methods: tuple[str, ...] = SHORT
    """names in the table METHODS of examples/finetune/compare.py, each in quotes"""
    epochs: float = 2.0
    """passes over the rows"""
    seq_len: int = 48
    """length of a row, tokens"""
    lr_times: float = 1.0
    """multiplies every method's learning rate"""


def settings(flags: Any) -> FinetuneConfig:
    """What all runs share, of flags with model, data, epochs and seq_len."""
    return FinetuneConfig(
        task="classify",
        model=flags.model,
        data=flags.data,
        epochs=flags.epochs,
        seq_len=flags.seq_len,
        eval_every=0,
        checkpoint_every=0,
    )


def main(args: Sequence[str] | None = None) -> int:
    flags = parsed(CompareConfig, "python -m examples.finetune.compare", args, CODES)
    config = settings(flags)
    try:
        if unknown := [name for name in flags.methods if name not in METHODS]:
            raise UsageError(
                f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}"
            )
        runs = compare(config, flags.methods, (flags.lr_times,))
    except UsageError as error:
        say(f"error: {error}")
        return 2
    print(table(runs, METRIC))
    print(f"One seed, learning rates as given; {pathlib.Path(flags.data).name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
