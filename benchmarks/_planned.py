"""What the planner says of a scanned layer: policies for budgets, bytes of policies."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lowrank_optax import activations


class Layer(NamedTuple):
    """A scanned layer as the planner takes it, with shapes of its arguments."""

    block: Callable[[Any, Any], Any]
    args: tuple[Any, Any]
    count: int


def find_layer(gradient: Callable[..., Any], arguments: Any, count: int) -> Layer:
    """Returns the layer that `gradient(*arguments, wrap=...)` wraps and scans."""
    seen: list[Any] = []

    def look(layer: Callable) -> Callable:
        def body(x: Any, params: Any) -> Any:
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, x)
            )
            seen.append((layer, shapes))
            return layer(x, params)

        return body

    jax.eval_shape(lambda *args: gradient(*args, wrap=look), *arguments)
    layer, shapes = seen[0]
    return Layer(lambda params, x: layer(x, params)[0], shapes, count)


def planned(layer: Layer, fraction: float, hardware: str) -> activations.Policy:
    """The policy for a part of what keeping every tagged value takes."""
    plan = activations.plan_activations(
        layer.block,
        layer.args,
        layer.count,
        budget_fraction=fraction,
        hardware=hardware,
    )
    return plan.segments[0].policy


def predicted_bytes(layer: Layer, policy: Mapping[str, Any], hardware: str) -> int:
    """What the planner counts for all layers under a policy."""
    return activations.predict(*layer, policy, hardware=hardware).total_bytes
