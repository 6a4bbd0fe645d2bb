"""One layer of a stack: how a transformation learns that it sees a slice."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Layer(NamedTuple):
    """Which part of the stacks a transformation is given, all others being masked.

    Attributes:
      index: which layer, an int32 that may be traced.
      layers: how many layers the stacks have.
    """

    index: Any
    layers: int


_CURRENT: contextvars.ContextVar[Layer | None] = contextvars.ContextVar(
    "layer", default=None
)


@contextlib.contextmanager
def at_layer(index: Any, layers: int) -> Iterator[None]:
    """Stacks of one layer inside the block are layer ``index`` of whole ones.

    Read while tracing, wherever in a transformation the reader stands.
    """
    token = _CURRENT.set(Layer(index, layers))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_layer() -> Layer | None:
    """Returns the layer under way, None where trees are whole."""
    return _CURRENT.get()


def whole_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a leaf's whole stack."""
    layer = current_layer()
    return shape if layer is None or not shape else (layer.layers, *shape[1:])


def with_layer(step: Callable, last: Any) -> tuple[Callable, Any]:
    """Returns a step, and its last argument, that takes the layer along.

    A traced number from outside is none on the meshes that the step may enter.
    """
    layer = current_layer()
    if layer is None:
        return step, last

    def inside(*args: Any) -> Any:
        *first, (index, last) = args
        with at_layer(index, layer.layers):
            return step(*first, last)

    return inside, (layer.index, last)
