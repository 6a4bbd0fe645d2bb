"""Tables and pictures of ``benchmarks.tuned``: ``python -m benchmarks.evidence``.

Reads docs/results/tuned.jsonl, fills the marked parts of docs/evidence.md, and draws
loss against bytes of state and loss against the learning rate into docs/assets.
"""

import argparse
import json
import math
import pathlib
import re
import statistics
from typing import Any, NamedTuple

import lowrank_optax as lro
from benchmarks._contenders import BASELINES, CONTENDERS
from benchmarks.tuned import STAGES, Log, best_rate, loss_of

RUNS = pathlib.Path("docs/results/tuned.jsonl")
TIMES = pathlib.Path("docs/results/step_times.json")
PAGE = pathlib.Path("docs/evidence.md")
ASSETS = pathlib.Path("docs/assets")
# Readable on white and on the dark palette's grey.
COLORS = {"baseline": "#d0672e", "method": "#4a8fd0", "flagship": "#3aa05a"}


class Row(NamedTuple):
    """One optimizer at its best rate, over seeds."""

    name: str
    rate: float
    losses: tuple[float, ...]
    share: float  # of the matrices' state in AdamW's
    bytes: float  # of it, for every weight of the matrices
    deviation: float

    @property
    def mean(self) -> float:
        """The loss in the mean over seeds."""
        return statistics.mean(self.losses)


def rows(log: Log, stage: str) -> list[Row]:
    """Returns what a stage found, the best first."""
    found, adamw = [], log.find(name="optax.adamw")[0]
    for name in CONTENDERS:
        runs = log.find(stage=stage, name=name)
        if not runs:
            continue
        # Of several rates, the better one of those that have all seeds; in a search,
        # the one that is bracketed.
        by_rate = {r["rate"]: [] for r in runs}
        for r in runs:
            by_rate[r["rate"]].append(loss_of(r))
        most = max(map(len, by_rate.values()))
        means = {x: statistics.mean(y) for x, y in by_rate.items() if len(y) == most}
        rate = min(means, key=lambda x: means[x])
        if stage == "search" and rate != best_rate(log, name):
            continue
        runs = [r for r in runs if r["rate"] == rate]
        losses = tuple(loss_of(r) for r in sorted(runs, key=lambda r: r["seed"]))
        whole = log.find(stage=stage, name="optax.adamw") or [adamw]
        share = runs[0]["matrix_state"] / whole[0]["matrix_state"]
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        found.append(Row(name, runs[0]["rate"], losses, share, 8 * share, spread))
    return sorted(found, key=lambda row: row.mean)


def front(found: list[Row]) -> list[Row]:
    """Returns those that no other one beats in both loss and bytes."""
    ahead, lowest = [], math.inf
    for row in sorted(found, key=lambda row: (row.bytes, row.mean)):
        if row.mean < lowest:
            ahead.append(row)
            lowest = row.mean
    return ahead


def losses_table(found: list[Row], times: dict[str, Any]) -> str:
    """Formats one stage as Markdown."""
    lines = [
        "| optimizer | loss | over AdamW | state, bytes a weight | update, AdamW's = 1 "
        "| rate | each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    ahead = {row.name for row in front(found)}
    adamw = next((row.mean for row in found if row.name == "optax.adamw"), math.nan)
    for row in found:
        each = " ".join(f"{loss:.3f}" for loss in row.losses)
        loss = f"{row.mean:.3f}"
        if len(row.losses) > 1:
            loss += f" ± {row.deviation:.3f}"
        time = times[row.name]["over_adamw"] if row.name in times else math.nan
        time = "-" if math.isnan(time) else f"{time:.3g}"
        name = f"**{label(row.name)}**" if row.name in ahead else label(row.name)
        lines.append(
            f"| {name} | {loss} | {over(row.mean - adamw)} | {row.bytes:.2f} "
            f"| {time} | {row.rate:.3g} | {each} |"
        )
    return "\n".join(lines)


def over(difference: float) -> str:
    """Returns it with its sign, a dash where there is nothing to compare with."""
    return "-" if math.isnan(difference) else f"{difference:+.3f}"


def label(name: str) -> str:
    """Returns the name as Markdown."""
    base, comma, rest = name.partition(", ")
    return f"`{base}`{comma}{rest}"


def rates_table(log: Log) -> str:
    """Formats the search: the best rate, and what half and twice of it lose."""
    lines = [
        "| optimizer | best rate | loss | at half the rate | at twice |",
        "|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        rate = best_rate(log, name)
        if rate is None or CONTENDERS[name].kind == "trial":
            continue
        found = {r["rate"]: loss_of(r) for r in log.find(stage="search", name=name)}
        cells = [f"{found[x] - found[rate]:+.3f}" for x in (rate / 2, 2 * rate)]
        cells = ["diverged" if cell == "+inf" else cell for cell in cells]
        lines.append(
            f"| {label(name)} | {rate:.3g} | {found[rate]:.3f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


# What one part contributes: with it, and without.
PARTS = {
    "recovery of the rest, scaled": ("fira", "galore"),
    "a tracked basis with its moments": ("subtrack", "fira"),
    "steps as long as AdamW's": ("galore, matched", "galore"),
    "the same, with recovery": ("subtrack, matched", "subtrack"),
    "AdamW's moments in 8 bits": ("adamw_8bit", "optax.adamw"),
    "in 4 bits": ("adamw_4bit", "optax.adamw"),
    "GaLore's in 8 bits": ("galore_8bit", "galore"),
    "orthogonalization": ("optax.contrib.muon", "optax.sgd"),
    "Muon's momentum in 8 bits": ("muon, 8 bits", "optax.contrib.muon"),
    "in 4 bits, the draws taken off": ("muon, 4 bits", "optax.contrib.muon"),
    "even outputs": ("even muon", "optax.contrib.muon"),
    "the same, in 8 bits": ("even muon, 8 bits", "muon, 8 bits"),
    "the same, in 4 bits": ("even muon, 4 bits", "muon, 4 bits"),
    "one length for all shapes": ("even_muon", "even muon, 8 bits"),
}


def parts_table(log: Log) -> str:
    """Formats what parts contribute at the best rates of the search."""
    lines = ["| part | with it | without | difference |", "|---|---|---|---|"]
    for part, names in PARTS.items():
        found = [best_run(log, name) for name in names]
        if None in found:
            continue
        cells = [f"{label(n)} {x:.3f}" for n, x in zip(names, found, strict=True)]
        lines.append(f"| {part} | {' | '.join(cells)} | {found[0] - found[1]:+.3f} |")
    return "\n".join(lines)


def best_run(log: Log, name: str) -> Any:
    """Returns the lowest loss of a search that is bracketed."""
    rate = best_rate(log, name)
    runs = log.find(stage="search", name=name, rate=rate)
    return loss_of(runs[0]) if rate is not None else None


# The lab book: what was tried, and one line of what came of it.
TRIED = {
    "optax.contrib.muon": "the mark: 4 bytes a weight",
    "muon, 8 bits": "the momentum in 8 bits, even steps: nothing is lost",
    "muon, 4 bits": "in 4 bits, rounded at random, the draws taken off: something is",
    "muon, rows, 4 bits": "a quarter of the rows a step (Dion2), in 4 bits",
    "even muon": "NorMuon's even outputs behind the polar factor: better than the mark",
    "even muon, 8 bits": "and in 8 bits the same",
    "even muon, 4 bits, rounded at random": "4 bits, the draws left on: noise adds up",
    "even muon, 4 bits": "the draws taken off when the momentum is read",
    "even muon, 4 bits, groups of 32": "and finer groups",
    "even muon, 2 bits": "three levels (simulated)",
    "even muon, 8 bits, rms": "one length for all shapes: the parts of `lro.even_muon`",
    "even_muon": "the method itself; what rounds otherwise ends 0.02 away",
    "even muon, Haar means, 8 bits": "a momentum of means of two, and this step's rest",
    "even muon, Haar means of 4, 8 bits": "of four",
    "even muon, Haar means of 8, 8 bits": "of eight: 200 steps hardly use a momentum",
    "even muon, no momentum": "none: lowest after 200 steps, and not after 2,000",
    "even_muon, beta 0.9": "a shorter memory does the same",
    "even_muon, beta 0.8": "and one of five steps",
    "even muon, rank r, 8 bits": "a momentum of rank r, and this step's rest",
    "polar of rank r, columns": "a polar factor of rank r, the rest by columns (SCALE)",
    "subtrack": "Adam in a tracked basis, the rest scaled",
    "alice": "Adam in a basis, the rest by column energies over time",
    "column_sgd": "columns of this step's gradient alone: no state",
}


def trials_table(log: Log) -> str:
    """Formats the lab book."""
    lines = ["| trial | loss | bytes a weight | what it was |", "|---|---|---|---|"]
    adamw = log.find(stage="search", name="optax.adamw")[0]["matrix_state"]
    for name, words in TRIED.items():
        loss = best_run(log, name)
        if loss is None:
            continue
        run = log.find(stage="search", name=name)[0]
        size = f"{8 * run['matrix_state'] / adamw:.2f}"
        size = "-" if run["options"] == "simulated" else size
        lines.append(f"| {label(name)} | {loss:.3f} | {size} | {words} |")
    return "\n".join(lines)


def tables_table(log: Log) -> str:
    """Formats what embedding and head may get, at the best rate of each."""
    lines = [
        "| embedding and head | loss | best rate | bytes a number |",
        "|---|---|---|---|",
    ]
    names = dict.fromkeys(r["name"] for r in log.find(stage="tables"))
    adam = max(r["table_state"] for r in log.find(stage="tables"))
    rows = []
    for name in names:
        rate = best_rate(log, name, "tables")
        if rate is None:
            continue
        (run,) = log.find(stage="tables", name=name, rate=rate)
        share = 8 * run["table_state"] / adam
        short = name.partition("tables: ")[2]
        cells = f"{loss_of(run):.3f} | {rate:.3g} | {share:.2f}"
        rows.append((loss_of(run), f"| {short} | {cells} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))])


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure without a background, and its axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    grey = "#808a90"  # seen on white and on dark grey
    for group in ("text", "xtick", "ytick"):
        matplotlib.rc(group, color=grey)
    matplotlib.rc("axes", labelcolor=grey, edgecolor=grey)
    matplotlib.rc("svg", hashsalt="evidence")
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_front(found: list[Row], path: pathlib.Path, flagship: str) -> None:
    """Draws loss against bytes of state, the front as a line."""
    figure, axes = canvas(8, 6.5)
    least = min(row.bytes for row in found if row.bytes > 0.01)

    def place(row: Row) -> float:
        return max(row.bytes, least / 2)

    ahead = front(found)
    axes.step(
        [*map(place, ahead), 16], [*(row.mean for row in ahead), ahead[-1].mean],
        where="post", color="#808a90", linewidth=1, alpha=0.7,
    )  # fmt: skip
    floor = min(row.mean for row in found)
    shown = [row for row in found if row.mean < floor + 0.6]
    gap, written = 0.022 * (max(r.mean for r in shown) - floor), []
    for row in sorted(shown, key=lambda row: row.mean):
        # A name stands above those of its neighbours.
        near = [y for x, y in written if 0.7 < x / place(row) < 1.5]
        height = max([row.mean, *(y + gap for y in near if y + gap > row.mean)])
        written.append((place(row), height))
        kind = "baseline" if CONTENDERS[row.name].kind == "baseline" else "method"
        kind = "flagship" if row.name == flagship else kind
        axes.errorbar(
            place(row), row.mean, None if math.isnan(row.deviation) else row.deviation,
            fmt="s" if kind == "baseline" else "o", color=COLORS[kind], ms=6,
            elinewidth=1,
        )  # fmt: skip
        axes.annotate(
            row.name.removeprefix("optax."), (place(row), row.mean),
            (1.07 * place(row), height), fontsize=9.5, color=COLORS[kind], va="center",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of optimizer state for every weight of a matrix")
    axes.set_ylabel("validation loss, nats per byte of text")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    save(figure, path)


def draw_rates(log: Log, names: list[str], path: pathlib.Path) -> None:
    """Draws what a rate that is not the best one costs."""
    figure, axes = canvas(7.5, 4)
    for name in names:
        best = best_rate(log, name)
        if best is None:
            continue
        runs = sorted(log.find(stage="search", name=name), key=lambda r: r["rate"])
        runs = [r for r in runs if 0.2 < r["rate"] / best < 5]
        least = min(map(loss_of, runs))
        axes.plot(
            [r["rate"] / best for r in runs], [loss_of(r) - least for r in runs],
            "o-", ms=4, linewidth=1.2, label=name.removeprefix("optax."),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.01, 0.4)
    axes.set_xlabel("learning rate over the best one")
    axes.set_ylabel("loss above the best")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.legend(fontsize=8, ncols=2, framealpha=0)
    save(figure, path)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes an SVG without a date, so that equal pictures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def filled(page: str, parts: dict[str, str]) -> str:
    """Returns a page with what stands between its marks replaced."""
    for name, text in parts.items():
        begin, end = (
            f"<!-- {name}: python -m benchmarks.evidence -->",
            f"<!-- /{name} -->",
        )
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page, number = re.subn(
            pattern, lambda _, new=f"{begin}\n{text}\n{end}": new, page, flags=re.S
        )
        if number != 1:
            raise ValueError(f"The page has {number} places for {name}.")
    return page


def widths_table(log: Log) -> str:
    """Formats what the best rate of half the width costs at the whole width."""
    lines = [
        "| optimizer | best rate at width 64 | loss with it at width 128 "
        "| with the better rate | more |",
        "|---|---|---|---|---|",
    ]
    costs = []
    for row in rows(log, "confirm"):
        rate = best_rate(log, row.name)
        runs = log.find(stage="confirm", name=row.name, rate=rate)
        carried = statistics.mean(map(loss_of, runs))
        more = 100 * (carried / row.mean - 1)
        cells = f"{rate:.3g} | {carried:.3f} | {row.mean:.3f} | {more:.1f} %"
        costs.append((more, f"| {label(row.name)} | {cells} |"))
    return "\n".join([*lines, *(line for _, line in sorted(costs))])


def decay_table(log: Log) -> str:
    """Formats the longest runs with weight decay beside those without."""
    lines = ["| optimizer | with decay | without | difference |", "|---|---|---|---|"]
    for run in sorted(log.find(stage="decay"), key=loss_of):
        name = run["name"]
        (plain,) = log.find(stage="longest", name=name, rate=run["rate"])
        with_it, without = loss_of(run), loss_of(plain)
        lines.append(
            f"| {label(name)} | {with_it:.3f} | {without:.3f} "
            f"| {with_it - without:+.3f} |"
        )
    return "\n".join(lines)


def parts(log: Log) -> dict[str, str]:
    """Returns the tables by the names of their places."""
    times = json.loads(TIMES.read_text())["steps"]
    found = {"rates": rates_table(log), "parts": parts_table(log)}
    found["trials"] = trials_table(log)
    found["widths"] = widths_table(log)
    if log.find(stage="tables"):
        found["tables"] = tables_table(log)
    if log.find(stage="decay"):
        found["decay"] = decay_table(log)
    for stage in STAGES:
        if stage in ("confirm", "long", "longest") and log.find(stage=stage):
            found[stage] = losses_table(rows(log, stage), times)
    return found


def main() -> None:
    """Fills the page and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flagship", default="even_muon")
    parser.add_argument(
        "--curves", nargs="*",
        default=["optax.adamw", "optax.contrib.muon", "galore", "subtrack", "gwt"],
    )  # fmt: skip
    options = parser.parse_args()
    log, named = Log(RUNS), {*BASELINES, *lro.METHODS}
    PAGE.write_text(filled(PAGE.read_text(), parts(log)))
    # Methods as they are, on the matrices: variants and trials are in the tables.
    plain = [r for r in rows(log, "search") if r.name in named]
    draw_front(plain, ASSETS / "loss_and_bytes.svg", options.flagship)
    draw_rates(log, [*options.curves, options.flagship], ASSETS / "rates.svg")


if __name__ == "__main__":
    main()
