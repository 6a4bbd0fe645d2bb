"""Fine-tunes a real encoder by every method: `python -m benchmarks.finetune --model M`.

The learning rate of each is the best of the grid on the dev part, at the first seed;
the others repeat that one. A file of runs is gone on with: an interrupted comparison
loses one run. The weights are those that `make finetune` leaves in
`runs/models/bert-tiny`.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from examples.finetune.compare import METHODS, METRIC, compare, settings, table

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "examples/finetune/data/uci_sentences.jsonl"
GRID = (0.3, 1.0, 3.0, 10.0)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/models/bert-tiny")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--out", default="docs/results/finetune.jsonl")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seq-len", type=int, default=48)
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    config = settings(flags)
    setting = {
        "data": pathlib.Path(flags.data).name,
        "epochs": flags.epochs,
        "seq_len": flags.seq_len,
    }

    def add(run: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps(setting | run) + "\n")

    done = [r for r in read(out) if {k: r.get(k) for k in setting} == setting]
    runs = compare(config, flags.methods, flags.rates, flags.seeds, done, add)
    print(f"{setting}; learning rates tried: a method's own times {flags.rates}\n")
    for name in flags.methods:
        tried = sorted(
            (r["lr"], r) for r in runs if r["name"] == name and r["seed"] == 0
        )
        print(
            f"{name}: "
            + ", ".join(
                f"{lr:.2g} -> {r['dev'][f'val_{METRIC}']:.3f}" for lr, r in tried
            )
        )
    print("\n" + table(runs, METRIC))
    return 0


if __name__ == "__main__":
    sys.exit(main())
