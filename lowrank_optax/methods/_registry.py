"""``METHODS``: every published method by its name."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
      name: of the function and of its card, ``docs/methods/<name>.md``.
      title: the paper's name for it.
      paper: number of the paper at arxiv.org.
      reference: authors and title of the paper.
      factory: the function, with learning rate and weight decay.
      direction: its ``scale_by_`` form without these, None if there is none.
    """

    name: str
    title: str
    paper: str
    reference: str
    factory: Callable[..., Any]
    direction: Callable[..., Any] | None = None


_methods: dict[str, Method] = {}
METHODS: Mapping[str, Method] = types.MappingProxyType(_methods)
"""Every method, by name and in the order of the tables; see ``lro.Method``."""


def enter(method: Method) -> None:
    """Adds a method, or replaces the one of its name."""
    _methods[method.name] = method
