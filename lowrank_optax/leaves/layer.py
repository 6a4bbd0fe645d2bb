"""``Layer``: which layer of the stacks a transformation is given."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """The extra argument ``layer`` of an update that sees one layer of every stack.

    Stacks have one layer then, and all other leaves are masked. Who decides by shapes
    decides on those of whole stacks, and what counts layers starts at ``index``.

    Attributes:
      index: which layer, int32; it may be traced.
      layers: how many layers the stacks have.
    """

    index: jax.Array
    layers: int = dataclasses.field(metadata={"static": True})
