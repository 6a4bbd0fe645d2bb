"""A plan for activation memory in a run's folder: a table, JSON and a picture."""

import pathlib

from examples.llama.tokenizer import write_whole
from lowrank_optax import activations


def write_plan(plan: activations.ActivationPlan, folder: pathlib.Path) -> None:
    """The plan as a table, as JSON and as a picture."""
    write_whole(folder / "activation_plan.txt", plan.table() + "\n")
    write_whole(folder / "activation_plan.json", plan.to_json() + "\n")
    draw(plan, folder / "activation_plan.png")


def draw(plan: activations.ActivationPlan, path: pathlib.Path) -> None:
    """Bytes of a layer's tagged values: as they are, and what is kept of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    choices = plan.segments[0].choices
    figure = Figure(figsize=(7, 0.4 * len(choices) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(choices))
    whole = [choice.saved_bytes / 2**20 for choice in choices]
    kept = [choice.nbytes / 2**20 for choice in choices]
    axes.barh(places, whole, color="#d0d0d0", label="as it is")
    axes.barh(places, kept, height=0.5, color="#4477aa", label="kept")
    axes.set_yticks(places, [f"{c.tag}: {c.action}" for c in choices])
    axes.invert_yaxis()
    axes.set_xlabel("MiB per layer")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=120)
