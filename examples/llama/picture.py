"""`draw` makes the picture of a run, loss.png, from the lines of its metrics.

Above the loss, below the speed and what lies in memory.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Line = dict[str, Any]
_BLUE, _ORANGE, _GREY = "#3573b1", "#d1701f", "#777777"
# Of the window that a line is smoothed over, in parts of the run.
_PARTS = 20
# True of this trainer, which has no dropout.
NOTE = (
    "Training: a step's own rows, before its update. Validation: other rows, always "
    "the same, after the update. It may lie\nbelow training where its rows are easier, "
    "or the loss falls quickly. Both are without dropout."
)


@dataclasses.dataclass(frozen=True)
class About:
    """What the lines do not say.

    Attributes:
      title: what ran.
      loss: the unit of a loss.
      perplexity: of what, such as "byte"; empty: exp(loss) means nothing here.
      baseline: a loss to beat, and whose it is.
      memory: bytes, each with its name.
    """

    title: str = ""
    loss: str = "nats per token"
    perplexity: str = ""
    baseline: tuple[str, float] | None = None
    memory: Sequence[tuple[str, int]] = ()


def draw(lines: Sequence[Line], path: pathlib.Path, about: About) -> None:
    """Writes the picture of the lines."""
    # Without pyplot, which keeps figures and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    if about.title:
        figure.suptitle(about.title, fontsize=12)
    (loss, _), (speed, memory) = figure.subplots(
        2, 2, gridspec_kw={"height_ratios": [3, 1.2]}
    )
    figure.delaxes(_)
    loss.set_subplotspec(loss.get_gridspec()[0, :])
    draw_loss(loss, lines, about)
    draw_speed(speed, lines, f"{about.perplexity or 'target'}s")
    draw_memory(memory, about.memory)
    figure.supxlabel(NOTE, fontsize=7.5, color=_GREY, x=0.02, ha="left")
    figure.savefig(path, dpi=120)


def draw_loss(axes: Any, lines: Sequence[Line], about: About) -> None:
    """The loss of every step, smoothed, that of the validations, and a baseline."""
    steps, losses = column(lines, "loss")
    if len(steps):
        reach = len(steps) // _PARTS // 2
        raw, label = axes.plot(steps, losses, ".-", color=_BLUE, markersize=2), ""
        if reach:
            raw[0].set(alpha=0.3, linewidth=0.8, marker="")
            label = f", mean of {2 * reach + 1} steps around each"
            raw = axes.plot(steps, smoothed(losses, reach), color=_BLUE)
        raw[0].set_label(f"training{label}")
    steps, losses = column(lines, "val_loss")
    if len(steps):
        axes.plot(steps, losses, "o-", color=_ORANGE, markersize=4, label="validation")
    if about.baseline is not None:
        name, value = about.baseline
        axes.axhline(value, color=_GREY, linestyle="--", label=f"{name}: {value:.2f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss, {about.loss}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=9)
    if about.perplexity:
        side = axes.secondary_yaxis(
            "right", functions=(lambda x: np.exp(np.minimum(x, 700)), logarithm)
        )
        side.set_yticks(
            round_numbers(*(math.exp(min(x, 700)) for x in axes.get_ylim()))
        )
        side.minorticks_off()
        side.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        side.set_ylabel(f"perplexity per {about.perplexity}")


def draw_speed(axes: Any, lines: Sequence[Line], unit: str) -> None:
    """What a step saw per second, save in the first, whose time is the compiler's."""
    made = [line for line in lines if line.get("seconds") and line.get("tokens")]
    steps = [line["step"] for line in made[1:]]
    speeds = [
        (now["tokens"] - before["tokens"]) / now["seconds"]
        for before, now in itertools.pairwise(made)
    ]
    if speeds:
        axes.plot(steps, speeds, color=_BLUE, linewidth=0.8)
        axes.set_ylim(bottom=0)
    middle = f", median {np.median(speeds):,.0f}" if speeds else ""
    axes.set_title(f"{unit} per second{middle}", fontsize=9)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def draw_memory(axes: Any, memory: Sequence[tuple[str, int]]) -> None:
    """A bar for everything that lies in memory."""
    unit, size = (
        ("GiB", 2**30)
        if max([0, *(b for _, b in memory)]) >= 2**30
        else (
            "MiB",
            2**20,
        )
    )
    names, values = [name for name, _ in memory], [held / size for _, held in memory]
    bars = axes.barh(names[::-1], values[::-1], color=_BLUE, height=0.6)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_title(f"memory, {unit}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def column(lines: Sequence[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and what their lines have under the key."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    table = np.asarray(points, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean around each value, of fewer at the ends: it does not lag behind."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    own = np.minimum(np.minimum(at, at[::-1]), reach)
    return (sums[at + own + 1] - sums[at - own]) / (2 * own + 1)


def round_numbers(low: float, high: float) -> list[float]:
    """Between two: more of them where the two are close."""
    heads = (1, 2, 5) if high > 200 * low else (1, 1.5, 2, 3, 5, 7)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    every = [head * 10.0**power for power in powers for head in heads]
    return [number for number in every if low <= number <= high]


def logarithm(values: Any) -> Any:
    return np.log(np.maximum(values, 1e-300))
