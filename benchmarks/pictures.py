"""Draws the pictures of the documentation: ``python -m benchmarks.pictures``.

All numbers come from ``docs/results`` and from the library. Every picture is drawn for
a light and for a dark page, at the width that a telephone has: 400 px. The loss curves
belong to ``benchmarks/loss_curves.py``.
"""

import argparse
import inspect
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import lowrank_optax as lro

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS, PICTURES = DOCS / "results", DOCS / "assets/pictures"
WIDTH = 4.0  # inches, of 96 px
TIMES = "\N{MULTIPLICATION SIGN}"


class Theme(NamedTuple):
    """Colors that can be told apart on the background of a page."""

    suffix: str
    text: str
    faint: str
    main: str
    other: str
    colors: tuple[str, ...]
    box: str


LIGHT = Theme(
    "", "#263238", "#78909c", "#33639c", "#c05a10",
    ("#33639c", "#c05a10", "#2e7d4f", "#8e3b8e"), "#e8eef3",
)  # fmt: skip
DARK = Theme(
    "-dark", "#e2e6ec", "#8a97a5", "#7fb0e6", "#f0a15a",
    ("#7fb0e6", "#f0a15a", "#7ccf9b", "#d99ad9"), "#2f3542",
)  # fmt: skip
# Rows of the bars, each with a method whose state in the file is theirs.
MEMORY = {
    "adamw": "adamw",
    "muon": "muon",
    "even_muon": "even_muon",
    "adamw_8bit": "adamw_8bit",
    "galore, fira, subtrack": "galore",
    "apollo, dct_adamw, foam": "apollo",
    "galore_8bit": "galore_8bit",
    "q_galore": "q_galore",
    "gwt, level 3": "gwt, level 3",
    "lora_pre": "lora_pre, rank / 8",
    "apollo_mini": "apollo_mini",
    "column_sgd": "column_sgd",
}
STEPS = (
    "optax.adamw", "lro.adamw_8bit", "lro.galore power", "lro.galore_8bit",
    "lro.fira", "lro.subtrack", "lro.ldadam", "lro.online_subspace_descent",
    "lro.apollo", "lro.apollo_mini", "lro.coap", "lro.dct_adamw", "lro.frugal",
    "lro.sumo", "lro.gwt",
)  # fmt: skip


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def figure(theme: Theme, height: float, *shape: int, **options: Any) -> tuple[Any, Any]:
    """A figure without a background, and its axes."""
    found = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(found)
    found.patch.set_alpha(0)
    axes = found.subplots(*shape, squeeze=False, **options)
    for ax in axes.flat:
        ax.patch.set_alpha(0)
        ax.tick_params(colors=theme.text)
        for name, spine in ax.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(theme.faint)
        for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
            label.set_color(theme.text)
    return found, axes


def bars(
    ax: Any, theme: Theme, names: Sequence[str], values: Sequence[float], title: str
) -> None:
    """Horizontal ones, the first name on top and in the other color: what all know."""
    colors = [theme.other, *[theme.main] * (len(names) - 1)]
    found = ax.barh(names, values, color=colors, height=0.7)
    ax.bar_label(found, fmt="%.3g", padding=3, color=theme.text, fontsize=9)
    ax.set_title(title, fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.2, y=0.02)
    ax.set_xticks([])
    ax.tick_params(length=0)


def memory(theme: Theme) -> Any:
    found = results("state_memory")["state"]
    drawn, axes = figure(theme, 3.2, 1, 2, sharey=True)
    for ax, size in zip(axes[0], ("1b", "7b"), strict=True):
        values = [found[size][key] / 1e9 for key in MEMORY.values()]
        bars(ax, theme, [*MEMORY], values, f"{size.upper()}: state, GB")
    axes[0][0].invert_yaxis()  # shared, so turned twice
    return drawn


def step_time(theme: Theme) -> Any:
    trees = {
        tree["tree"]: tree["rows"] for tree in results("optimizer_step")["results"]
    }
    times = {row["optimizer"]: row["applied_ms"] for row in trees["stacked"]}
    drawn, axes = figure(theme, 3.6, 1, 1)
    names = [name.removesuffix(" power").removeprefix("lro.") for name in STEPS]
    title = "ms for a step, weights moved"
    bars(axes[0][0], theme, names, [times[name] for name in STEPS], title)
    return drawn


def refreshes(theme: Theme) -> Any:
    """When a basis is found anew, by the methods' own defaults."""
    names = ("galore", "coap", "dct_adamw", "apollo", "gwt")
    drawn, axes = figure(theme, 2.1, 1, 1)
    ax = axes[0][0]
    for row, name in enumerate(names):
        own = inspect.signature(lro.METHODS[name].factory).parameters
        gap = own["update_proj_gap"].default if "update_proj_gap" in own else None
        ax.plot([0, 600], [row, row], color=theme.faint, linewidth=0.6)
        if gap == 1:
            ax.barh(row, 600, 0.4, color=theme.main)
        elif gap:
            at = np.arange(0, 601, gap)
            ax.plot(at, np.full(len(at), row), "|", color=theme.main, markersize=11)
        text = f"every {gap}" if gap else "none"
        ax.text(612, row, text, color=theme.text, fontsize=9, va="center")
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_ylim(len(names) - 0.3, -0.6)
    ax.set_xlim(-10, 730)
    ax.set_xticks(range(0, 601, 200))
    ax.set_xlabel("step", fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return drawn


def energy(theme: Theme) -> Any:
    """What bases capture of real gradients over time."""
    found = results("basis_sees")
    kernel = found["kernels"]["attention q"]
    drawn, axes = figure(theme, 2.6, 1, 1)
    ax = axes[0][0]
    curves = kernel["captured"]
    names = [name for name in curves if name != "any basis"]
    ax.plot(curves["any basis"], color=theme.text, linestyle=":", linewidth=1)
    ax.lines[-1].set_label(f"any basis of rank {found['rank']}")
    for name, color in zip(names, theme.colors, strict=True):
        ax.plot(curves[name], color=color, linewidth=1.2, label=name)
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel("captured energy", fontsize=9)
    ax.set_ylim(0, 1.03)
    drawn.legend(
        loc="outside upper center", ncols=3, fontsize=9, frameon=False,
        labelcolor=theme.text,
    )  # fmt: skip
    return drawn


def bracket(theme: Theme) -> Any:
    """One step, from the gradient to the update."""
    drawn, axes = figure(theme, 3.7, 1, 1)
    ax = axes[0][0]
    ax.set(xlim=(0, 400), ylim=(368, 0))
    ax.axis("off")

    def box(x: float, y: float, wide: float, text: str, small: str, color: str) -> None:
        style = "round,pad=0,rounding_size=6"
        ax.add_patch(
            FancyBboxPatch((x, y), wide, 44, style, fc=theme.box, ec=color, lw=1.2)
        )
        middle = x + wide / 2
        ax.text(middle, y + 15, text, ha="center", va="center", color=theme.text)
        ax.text(
            middle,
            y + 32,
            small,
            ha="center",
            va="center",
            color=theme.text,
            fontsize=8,
        )

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "color": theme.text, "lw": 1.1}
        ax.annotate("", end, start, arrowprops=style | {"shrinkA": 0, "shrinkB": 0})

    right, wide = 172, 220
    stages = (
        ("refresh the basis", f"P, m {TIMES} r, when it is due", theme.faint),
        ("transport the moments", "from the old basis to the new", theme.faint),
        ("project", f"R = Pᵀ G, r {TIMES} n", theme.main),
        ("inner optimizer", f"any Optax transformation, r {TIMES} n", theme.other),
        ("recover, limit", "the rest of G; optional", theme.faint),
        ("backproject", f"scale · P N, m {TIMES} n", theme.main),
    )
    for at, (text, small, color) in enumerate(stages):
        box(right, 8 + 60 * at, wide, text, small, color)
        if at:
            x = right + wide / 2
            arrow((x, 60 * at - 8), (x, 60 * at + 8))
    box(6, 8, 110, "gradient G", f"m {TIMES} n", theme.faint)
    box(6, 308, 110, "update", f"m {TIMES} n", theme.faint)
    arrow((116, 30), (right, 30))
    arrow((right, 330), (116, 330))
    # The bracket itself, around what is small.
    ax.plot([160, 150, 150, 160], [132, 132, 348, 348], color=theme.other, lw=2.5)
    ax.text(
        140, 220, f"in here all\nis r {TIMES} n,\nthe state,\ntoo",
        ha="right", va="center", color=theme.other, fontsize=10,
    )  # fmt: skip
    return drawn


def kind(name: str) -> Callable[[Theme], Any]:
    """What a method of this kind does to a gradient, whose columns are points."""
    titles = {
        "found": ("at a refresh", "at the next"),
        "moved": ("a basis", "turned a little"),
        "fixed": ("given", "given anew, or kept"),
        "none": ("the gradient is whole", "its state coarse, or none"),
    }
    turns = {"found": (0.5, 1.25), "moved": (0.5, 0.85), "fixed": (-0.5, 2.3)}

    def draw(theme: Theme) -> Any:
        drawn, axes = figure(theme, 1.75, 1, 2)
        random = np.random.default_rng(3)
        cloud = random.normal(size=(26, 2)) * (1.0, 0.28)
        for at, (ax, angle) in enumerate(zip(axes[0], (0.5, 1.25), strict=True)):
            turn = np.array(
                [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
            )
            points = cloud @ turn
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.2, 2.2), xticks=[], yticks=[])
            ax.set_aspect("equal")
            ax.spines[:].set_visible(False)
            ax.set_title(titles[name][at], fontsize=9)
            if name == "none":
                for x in np.arange(-2, 2.1, 0.5):
                    ax.axvline(x, color=theme.faint, lw=0.4)
                    ax.axhline(x, color=theme.faint, lw=0.4)
                kept = points if not at else np.round(points * 2) / 2
            else:
                way = np.array([np.cos(turns[name][at]), np.sin(turns[name][at])])
                kept = (points @ way)[:, None] * way
                if at and name != "fixed":
                    old = np.array([np.cos(turns[name][0]), np.sin(turns[name][0])])
                    line = np.outer([-2.3, 2.3], old)
                    ax.plot(*line.T, color=theme.faint, lw=1, ls="--")
                ax.plot(*np.outer([-2.3, 2.3], way).T, color=theme.main, lw=1.6)
                for before, after in zip(points, kept, strict=True):
                    ax.plot(*zip(before, after, strict=True), color=theme.faint, lw=0.5)
            ax.plot(*points.T, ".", color=theme.faint, ms=3.5)
            ax.plot(*kept.T, ".", color=theme.other, ms=5)
        return drawn

    return draw


DRAWN: dict[str, Callable[[Theme], Any]] = {
    "memory": memory,
    "step_time": step_time,
    "refreshes": refreshes,
    "energy": energy,
    "bracket": bracket,
    **{f"kind-{name}": kind(name) for name in ("found", "moved", "fixed", "none")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=[*DRAWN], default=[*DRAWN])
    parser.add_argument("--out", type=pathlib.Path, default=PICTURES)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for name in flags.only:
        for theme in (LIGHT, DARK):
            # Text stays text, and two runs draw the same file.
            style: dict[Any, Any] = {
                "svg.fonttype": "none",
                "svg.hashsalt": name,
                "font.size": 10,
            }
            with mpl.rc_context(style):
                path = flags.out / f"{name}{theme.suffix}.svg"
                DRAWN[name](theme).savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
