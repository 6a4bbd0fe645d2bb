"""Options that many methods share, written once.

A method takes them as ``**options``; its signature still lists every one, for
``help()`` and for ``optax.inject_hyperparams``, which reads signatures.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from lowrank_optax.bracket.chain import project

Method = TypeVar("Method", bound=Callable[..., Any])


class ProjectOptions(TypedDict, total=False):
    """The keyword arguments of ``lro.project`` that a method passes on."""

    side: str
    select: Any
    min_size: int
    weight_dimension_numbers: Any
    layer_axis: int | None
    clip_rank: bool
    param_shardings: Any
    full: Any
    dtype: Any
    stagger: bool
    seed: int


def takes(source: Callable[..., Any], *but: str) -> Callable[[Method], Method]:
    """Lists the keyword arguments of ``source``, some left out, in place of ``**``."""

    def merge(method: Method) -> Method:
        own = inspect.signature(method)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in named} | set(but)
        more = [p for p in _keywords(source) if p.name not in names]
        signature = own.replace(parameters=[*named, *more])
        method.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return method

    return merge


def takes_project_options(method: Method) -> Method:
    """``takes`` for those of ``ProjectOptions``."""
    return takes(project)(method)


def _keywords(source: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns what is passed by name alone; of ``project`` only what is listed."""
    parameters = inspect.signature(source).parameters.values()
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if source is project:
        return [p for p in named if p.name in ProjectOptions.__annotations__]
    return named
