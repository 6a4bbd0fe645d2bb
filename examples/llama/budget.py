"""`planned_train` is the step under `--activation-budget`: its plans, made on the run's
own data, and their record in the run's folder.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import Resolved, UsageError
from examples.llama.model import ModelConfig, Wrap, abstract_model
from examples.llama.placement import AXES, ROWS
from examples.llama.run_folder import not_vital, write_whole
from examples.llama.step import joined
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
ACTIONS = ("save", "recompute", "int8", "int4", "int4+8")
NEVER = 2**31
DELAY = 20  # steps from a new plan to the first step under it


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


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """The scanned layer of a model as the planner takes it, and what enters it."""

    definition: Any
    model: ModelConfig
    block: Callable[[Any, jax.Array], jax.Array]
    rows: int
    length: int

    def args(self, params: Any) -> tuple[Any, jax.Array]:
        """The shapes of the block's arguments, when traced."""
        shape = (self.rows, self.length, self.model.width)
        x = jnp.zeros(shape, self.model.compute_dtype)
        return jax.tree.map(lambda leaf: leaf[0], params["layers"]), x

    def errors(self, params: Any, micro: Any) -> Any:
        """Probed errors of every tag and action, the larger of two layers'.

        The first layer sees what no other does, embeddings; the one in the middle
        stands for the rest. Both are probed with their real inputs and the loss's real
        cotangents.
        """
        actions = [activations.parse_action(name) for name in ACTIONS]
        found: dict[Any, float] = {}
        for at in {0, self.model.layers // 2}:
            args, cotangent = self._sample(params, micro, at)
            errors = activations.probe_errors(
                self.block,
                args,
                actions,
                cotangent=cotangent,
                n_layers=self.model.layers,
            )
            found = {key: max(e, found.get(key, 0.0)) for key, e in errors.items()}
        return found

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def _sample(self, params: Any, micro: Any, at: int) -> Any:
        """A layer's arguments, and the cotangent of its result; nothing is kept."""
        model = nnx.merge(self.definition, params)

        def run(x: jax.Array, part: slice) -> jax.Array:
            stack = jax.tree.map(lambda leaf: leaf[part], params["layers"])
            # A probe must not hold the activations of all layers, which the budget
            # denies.
            body = jax.checkpoint(self.block, prevent_cse=False)
            return jax.lax.scan(lambda x, p: (body(p, x), None), x, stack)[0]

        def loss(y: jax.Array) -> jax.Array:
            y = run(y, slice(at + 1, None))
            logits = model.logits(model.norm(y))
            picked = jnp.take_along_axis(logits, micro["targets"][..., None], -1)[
                ..., 0
            ]
            losses = (jax.nn.logsumexp(logits, -1) - picked) * micro["mask"]
            return jnp.sum(losses) / jnp.maximum(jnp.sum(micro["mask"]), 1)

        x = model.enter(micro["tokens"])
        x = run(x, slice(0, at))
        own = jax.tree.map(lambda leaf: leaf[at], params["layers"])
        return (own, x), jax.grad(loss)(self.block(own, x))


def find_layers(config: Resolved, model: ModelConfig) -> Layers:
    """The model's layer for a micro-batch; nothing is computed."""
    definition, params = abstract_model(model)
    rows = config.batch_size // config.micro_batches
    seen: list[Any] = []

    def look(layer: Any) -> Any:
        seen.append(layer)
        return layer

    def forward(params: Any, tokens: Any) -> jax.Array:
        return nnx.merge(definition, params)(tokens, wrap_layer=look)

    tokens = jax.ShapeDtypeStruct((rows, config.seq_len), jnp.int32)
    jax.eval_shape(forward, params, tokens)

    def block(params: Any, x: jax.Array) -> jax.Array:
        # The layer was handed out while the model was traced. It closes over its
        # definition alone, no tracer, and so outlives the trace.
        return seen[0](x, params)[0]

    return Layers(definition, model, block, rows, config.seq_len)


def of_one_device(config: Resolved, sizes: dict[str, int]) -> Resolved:
    """The configuration with one device's rows of a micro-batch for a batch."""
    rows = config.batch_size // config.micro_batches
    local = max(rows // math.prod(sizes[axis] for axis in ROWS), 1)
    return dataclasses.replace(config, batch_size=local, micro_batches=1)


def options(config: Resolved, hardware: str) -> dict[str, Any]:
    """What the flags ask of the planner."""
    return {
        "hardware": hardware,
        "error_budget": config.activation_error or None,
        "actions": ACTIONS,
        **parse_budget(config.activation_budget),
    }


def plan_from_shapes(
    config: Resolved, model: ModelConfig, hardware: str
) -> activations.ActivationPlan:
    """A plan with errors by role; what cannot be is said before anything runs."""
    layers = find_layers(config, model)
    _, abstract = abstract_model(model)
    args = jax.eval_shape(layers.args, abstract)
    try:
        return activations.plan_activations(
            layers.block, args, model.layers, **options(config, hardware)
        )
    except (ImportError, ValueError) as error:
        raise UsageError(f"--activation-budget: {error}") from error


def planned_train(
    config: Resolved,
    model: ModelConfig,
    build: Callable[[Wrap], Any],
    load: Callable[[Any], Any],
    log: Callable[[dict[str, Any]], None],
    record: Any = None,
) -> activations.AdaptivePlanner:
    """The training step under plans for its layers.

    `build` makes the step with a wrapped layer, `load` turns what is stored between
    steps into parameters, `record` is what a run that goes on left. Bytes are counted
    for one device of `config.mesh`, which has all sizes or none.
    """
    if jax.process_count() > 1:
        raise UsageError(
            "--activation-budget plans by what one process measures, and there are "
            f"{jax.process_count()}; give an --activation-policy instead"
        )
    hardware = profile_name(jax.devices()[0].device_kind)
    sizes = dict.fromkeys(AXES, 1)
    sizes |= {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", config.mesh)}
    one = of_one_device(config, sizes)
    # Not for its plan: an impossible budget is refused before a step is compiled.
    plan_from_shapes(one, model, hardware)
    layers = find_layers(one, model)

    # Both are given what the step is given.
    def whole(stored: Any, *rest: Any) -> Any:
        _, _, _, frozen = (*rest, None, None, None, None)[:4]
        return joined(load(stored), frozen or {})

    def errors(*args: Any) -> Any:
        return layers.errors(whole(*args), jax.tree.map(lambda x: x[0], args[2]))

    def sample(*args: Any) -> Any:
        return layers.args(whole(*args))

    return activations.AdaptivePlanner(
        lambda plan: build(wrap_with(plan)),
        sample,
        layers.block,
        model.layers,
        every=config.replan_every or NEVER,
        swap_after=DELAY,
        errors=errors,
        record=record,
        log=log,
        **options(config, hardware),
    )


def wrap_with(plan: activations.ActivationPlan) -> Wrap:
    """The layer under the plan, which has one policy for all layers."""
    (segment,) = plan.segments
    return lambda layer: activations.compressed_checkpoint(layer, segment.policy)


def saved_plan(meta: dict[str, Any], config: Resolved) -> Any:
    """The saved run's knowledge of its plan, if this run asks for the same.

    Raises:
        UsageError: it is none that this program noted.
    """
    names = ("activation_budget", "activation_error", "replan_every")
    same = all(
        meta["settings"].get(n) == getattr(config, n)
        for n in (*names, "batch_size", "micro_batches", "seq_len")
    )
    record = meta.get("activation_plan") if same else None
    if record is None:
        return None
    try:
        for plan in filter(None, (record["plan"], record["next"])):
            activations.ActivationPlan.from_json(plan)
        if not all(type(record[name]) is int for name in ("steps", "due")):
            raise TypeError("its steps are no numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the plan in the checkpoint's record: {error}") from error
    return record


def write_plan(plan: activations.ActivationPlan, folder: pathlib.Path) -> None:
    """The plan as a table, as JSON and as a picture; none of them stops a run."""
    with not_vital("activation_plan was not written"):
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
