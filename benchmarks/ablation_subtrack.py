"""SubTrack++ taken apart on real text: ``python -m benchmarks.ablation_subtrack``.

The example's tiny LLaMA learns the sources of Python's standard library, once for each
way of putting the parts together: how the basis moves, what happens to the moments
when it does, and whether the rest of the gradient is recovered. Every low-rank row is
an ``lro.chain`` around the same Adam; all rows start from the same parameters and see
the same batches, per seed. A frozen basis is the one of the first gradient.

One learning rate serves all low-rank rows. Recovery lengthens their steps, so part of
what it gains may be learning rate: compare at several ``--lr`` before concluding.
"""

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.batches import Position, Rows, training_batches, validation_rows
from examples.llama.config import Resolved, TrainConfig, resolve
from examples.llama.corpus import load_corpora
from examples.llama.evaluate import eval_batches, evaluate
from examples.llama.model import abstract_model, init_params
from examples.llama.step import make_steps, split_rows
from examples.llama.tokenizer import load_tokenizer, write_whole

MOVES = {"frozen": "track", "tracked": "track", "walk": "walk", "jump": "jump"}
# Registry name and share of the preset's learning rate, which is GaLore's: AdamW does
# better at a tenth of it.
BASELINES = {
    "adamw": ("adamw", 1.0),
    "adamw-tenth": ("adamw", 0.1),
    "galore": ("galore", 1.0),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """One low-rank configuration: a choice from every column of the table."""

    basis: str
    transport: str
    recovery: str

    def build(self, config: Resolved, angle: float) -> optax.GradientTransformation:
        """Puts the parts together; no weight decay, as the preset has none."""
        gap = config.steps + 1 if self.basis == "frozen" else config.update_proj_gap
        step = angle if self.basis == "walk" else "line_search"
        move = MOVES[self.basis]
        projector = lro.grassmann(config.rank, gap, move=move, step=step)
        transport = lro.rotate_moments(config.b1, config.b2, self.transport)
        recovery = [lro.recover_scale()] if self.recovery == "on" else []
        bracket = lro.chain(
            lro.project(projector, transport=transport, layer_axis=0, seed=config.seed),
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            *recovery,
            lro.backproject(config.scale),
        )
        lr = optax.scale_by_learning_rate(optimizers.learning_rate(config))
        return optax.chain(bracket, lr)


def configurations() -> dict[str, Parts | None]:
    """Returns name -> parts, None for a baseline out of the trainer's registry."""
    rows = [Parts(basis, "debiased", on) for basis in MOVES for on in ("off", "on")]
    rows += [Parts("tracked", form, on) for form in ("off", "paper")
             for on in ("off", "on")]  # fmt: skip
    named: dict[str, Parts | None] = dict.fromkeys(BASELINES)
    return named | {f"{r.basis}/{r.transport}/{r.recovery}": r for r in rows}


class Experiment:
    """The text, cut and encoded once, and one run after the other on it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        flags = {"steps": options.steps, "update_proj_gap": options.gap}
        self.config, self.model = resolve(TrainConfig(preset="tiny", **flags))
        self.lr = self.config.lr if options.lr is None else options.lr
        self.text, held_out = load_corpora("", "", self.config.text_key)
        self.tokenizer = load_tokenizer(
            self.config.tokenizer, self.model.vocab_size, self.text, ""
        )
        rows = Rows(held_out, self.tokenizer, self.config.seq_len, True, None)
        self.validation = list(validation_rows(rows, self.config.eval_tokens))
        self.definition = abstract_model(self.model)[0]

    def settings(self) -> dict:
        """Returns what all runs of one file must have in common."""
        names = "preset steps update_proj_gap rank scale b1 b2 eps clip batch_size "
        config = {n: getattr(self.config, n) for n in (names + "seq_len").split()}
        return config | {
            "lr": self.lr,
            "walk_angle": self.options.angle,
            "corpus_hash": self.text.fingerprint(),
            "jax": jax.__version__,
            "platform": jax.default_backend(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }

    def run(self, name: str, parts: Parts | None, seed: int) -> dict:
        """Trains once and returns the validation loss at the end."""
        base, share = BASELINES.get(name, ("", 1.0))
        lr = share * (self.config.lr if base else self.lr)
        config = dataclasses.replace(self.config, optimizer=base, lr=lr, seed=seed)
        started = time.perf_counter()
        if parts is None:
            tx = optimizers.build_optimizer(config)
        else:
            tx = parts.build(config, self.options.angle)
        tx = optimizers.guarded(config, tx)
        steps = make_steps(self.definition, tx)
        params = init_params(self.model, seed)
        state, skipped = jax.jit(tx.init)(params), 0
        text = Rows(self.text, self.tokenizer, config.seq_len, True, seed)
        batches = training_batches(text, config.batch_size, Position())
        for _ in range(config.steps):
            batch = split_rows(next(batches)[0], config.micro_batches)
            params, state, metrics = steps.train(params, state, batch)
            skipped = metrics["skipped"]
        held_out = eval_batches(self.validation, config.eval_batch_size, config.seq_len)
        result = evaluate(steps.evaluate, params, held_out)
        assert result is not None  # nothing asked it to stop
        loss = result.loss if math.isfinite(result.loss) else None
        return {
            "name": name,
            "seed": seed,
            "lr": lr,
            "val_loss": loss,
            "skipped_steps": int(skipped),
            "seconds": round(time.perf_counter() - started, 1),
        }


def table(runs: list[dict]) -> str:
    """Formats all finished runs as Markdown, one row per configuration."""
    columns = "basis, transport, recovery, lr, loss, sd, perplexity, each seed"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * 8 + "|"]
    for name in configurations():
        rows = sorted((r for r in runs if r["name"] == name), key=lambda r: r["seed"])
        if rows:
            cells = *(name.split("/") if "/" in name else (name, "-", "-")), *sums(rows)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sums(rows: list[dict]) -> tuple[str, ...]:
    """Returns the cells that sum up one configuration's runs."""
    losses, lr = [row["val_loss"] for row in rows], f"{rows[0]['lr']:g}"
    each = " ".join("diverged" if x is None else f"{x:.4f}" for x in losses)
    if None in losses:
        return lr, "-", "-", "-", each
    mean = statistics.mean(losses)
    spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
    return lr, f"{mean:.4f}", spread, f"{math.exp(mean):.3f}", each


def earlier(out: pathlib.Path | None, settings: dict) -> list[dict]:
    """Returns the runs that the file holds already, made under the same settings."""
    if out is None or not out.exists():
        return []
    report = json.loads(out.read_text(encoding="utf-8"))
    was = report["settings"]
    changed = [k for k in settings | was if was.get(k) != settings.get(k)]
    if changed:
        sys.exit(f"{out} was made under another {', '.join(changed)}; move it away")
    return report["runs"]


def main() -> None:
    """Runs what is missing, one line each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="length of a run")
    parser.add_argument("--gap", type=int, default=10, help="steps between two bases")
    parser.add_argument("--lr", type=float, help="low-rank rows (default: the preset)")
    parser.add_argument("--angle", type=float, default=0.1, help="of a walk, radians")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=["*"], help="names, * allowed")
    parser.add_argument("--out", type=pathlib.Path, help="JSON to write, or to go on")
    options = parser.parse_args()
    experiment = Experiment(options)
    settings = experiment.settings()
    runs = earlier(options.out, settings)
    done = {(run["name"], run["seed"]) for run in runs}
    for seed in options.seeds:  # outermost: what is finished early can be compared
        for name, parts in configurations().items():
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
            if not wanted or (name, seed) in done:
                continue
            runs.append(experiment.run(name, parts, seed))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            if options.out:
                report = {"settings": settings, "runs": runs}
                write_whole(options.out, json.dumps(report, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
