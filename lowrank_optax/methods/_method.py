"""``method``: turns a recipe into a public method, and enters it into ``METHODS``.

A recipe is one function: the arguments of its own, ``**options`` for those of
``_shared``, and a body that composes the stages. The decorator lists every argument in
the signature and in the docstring, and refuses what the method would ignore.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from lowrank_optax.methods._arguments import boxed, checked, complete, rules_of
from lowrank_optax.methods._docstring import document
from lowrank_optax.methods._registry import METHODS, Method, enter

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")

# A scale_by_ form leaves these to its method.
STEP = ("learning_rate", "weight_decay", "mask")


def method(
    title: str,
    paper: str,
    reference: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    ignored: Iterable[str] = (),
    uses: Iterable[str] = (),
) -> Callable[[F], F]:
    """Makes a public method of a recipe.

    Args:
      title: the paper's name for it.
      paper: number of the paper at arxiv.org.
      reference: authors and title of the paper, for the docstring.
      defaults: of shared arguments, where they are not the shared ones.
      ignored: which arguments would have no effect, as "b1, b2 beside base_optimizer,
        transport" (where both are given) or "mask without weight_decay". A rule of
        ``IGNORED`` does not hold for an argument that stands here.
      uses: arguments that no rule of ``IGNORED`` holds for.

    Returns:
      A decorator.
    """

    def decorate(recipe: F) -> F:
        name = recipe.__name__
        signature, texts = complete(recipe, defaults or {})
        signature = boxed(signature)
        rules = rules_of(signature, ignored, uses)
        make = checked(recipe, f"lro.{name}", signature, rules)
        source = f"{reference}, https://arxiv.org/abs/{paper}"
        make.__doc__ = document(name, recipe.__doc__ or "", signature, texts, source)
        make._rules = rules
        enter(Method(name, title, paper, reference, make))
        return make

    return decorate


def direction(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[P, T]:
    """Returns the ``scale_by_`` form of a method: no learning rate, no decay."""
    full: Any = method
    name = f"scale_by_{full.__name__}"
    every = inspect.signature(full)
    kept = [p for n, p in every.parameters.items() if n not in STEP]

    def recipe(*args: Any, **options: Any) -> Any:
        # With None a recipe leaves such a stage out.
        left_out = {n: None for n in STEP[1:] if n in every.parameters}
        return recipe_of(full)(None, *args, **left_out, **options)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__module__ = full.__module__
    signature = every.replace(parameters=kept)
    rules = [rule for rule in full._rules if rule[0] not in STEP]
    make = checked(recipe, f"lro.{name}", signature, rules)
    del make.__wrapped__
    entry = METHODS[full.__name__]
    make.__doc__ = (
        f"The direction of {entry.title}: ``lro.{full.__name__}`` without its learning "
        "rate and weight decay.\n\nThe arguments are those of "
        f"``lro.{full.__name__}``, to be read there. The result is not negated: "
        "``optax.scale_by_learning_rate`` stands behind it in an ``optax.chain``.\n"
    )
    enter(dataclasses.replace(entry, direction=make))
    return make


def recipe_of(method: F) -> F:
    """Returns a method's recipe, for another to build on: nothing is checked twice."""
    return typing.cast(Any, inspect.unwrap(method))
