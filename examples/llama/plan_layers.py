"""`--activation-budget`: a plan for the model's layers, kept in the run's folder."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.activations import Wrap
from examples.llama.config import Resolved, UsageError
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.tokenizer import write_whole
from lowrank_optax import activations

# What a device calls itself -> its profile; the first that fits.
DEVICES = {
    "v5 lite|v5e": "v5e",
    "v5p|v5$": "v5p",
    "v4": "v4",
    "h200": "h200",
    "h100": "h100",
    "a100": "a100",
}


def parse_budget(text: str) -> dict[str, Any]:
    """A part of what saving every tagged value takes ("30%"), or bytes in all."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return {"budget_fraction": float(found[1]) / 100}
    if text.isdecimal():
        return {"budget_bytes": int(text)}
    raise UsageError(
        "--activation-budget must be a percentage such as 30% or a number of bytes; "
        f"got {text!r}"
    )


def profile_name(device_kind: str) -> str:
    """The profile of a device; "cpu" for one that is not known."""
    kind = device_kind.lower()
    return next(
        (name for seen, name in DEVICES.items() if re.search(seen, kind)), "cpu"
    )


def plan_layers(config: Resolved, model: ModelConfig) -> activations.ActivationPlan:
    """The plan for a micro-batch, from shapes alone: a resumed run has the same."""
    definition, params = abstract_model(model)
    rows = config.batch_size // config.micro_batches
    shape = (rows, config.seq_len)
    layers: list[Any] = []

    def forward(params: Any, tokens: Any) -> jax.Array:
        def look(layer: Any) -> Any:
            layers.append(layer)
            return layer

        return nnx.merge(definition, params)(tokens, wrap_layer=look)

    jax.eval_shape(forward, params, jax.ShapeDtypeStruct(shape, jnp.int32))
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["layers"]
    )
    x = jax.ShapeDtypeStruct((*shape, model.width), model.compute_dtype)
    try:
        return activations.plan_activations(
            lambda params, x: layers[0](x, params)[0],
            (one, x),
            model.layers,
            hardware=profile_name(jax.devices()[0].device_kind),
            **parse_budget(config.activation_budget),
        )
    except (ImportError, ValueError) as error:
        raise UsageError(f"--activation-budget: {error}") from error


def wrap_with(plan: activations.ActivationPlan) -> Wrap:
    """The layer under the plan, which has one policy for all layers."""
    (segment,) = plan.segments
    return lambda layer: activations.compressed_checkpoint(layer, segment.policy)


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
