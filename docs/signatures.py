"""Shows a method as `help()` does: all arguments, and the completed docstring.

Arguments that methods share, and everything about a `scale_by_` form, are added while
the package is imported, so reading the source alone does not find them.
"""

import importlib
import inspect
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Takes signatures and docstrings of the methods from the running functions."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Replaces each function of `lowrank_optax.methods` that is a method's."""
        del kwargs
        if pkg.path != "lowrank_optax":
            return
        methods = importlib.import_module("lowrank_optax").METHODS.values()
        for method in methods:
            for live in (method.factory, method.direction):
                if live is not None:
                    module = pkg[live.__module__.removeprefix("lowrank_optax.")]
                    replace(module, live)


def replace(module: griffe.Module, live: Any) -> None:
    """Puts the running function into the tree in place of what the source says."""
    source = module.members[live.__name__]
    known = source.parameters if isinstance(source, griffe.Function) else ()
    written = {p.name: p.annotation for p in known}
    parameters = [
        griffe.Parameter(
            p.name,
            annotation=written.get(p.name) or annotation(p),
            kind=griffe.ParameterKind(p.kind.description),
            default=None if p.default is p.empty else default(p.default),
        )
        for p in inspect.signature(live).parameters.values()
    ]
    function = griffe.Function(
        live.__name__,
        lineno=source.lineno,
        endlineno=source.endlineno,
        parameters=griffe.Parameters(*parameters),
        returns="optax.GradientTransformationExtraArgs",
        docstring=griffe.Docstring(live.__doc__),
    )
    module.set_member(live.__name__, function)


def annotation(parameter: inspect.Parameter) -> str:
    """The type as one reads it: without the folders in which it is defined."""
    if parameter.name == "learning_rate":
        return "optax.ScalarOrSchedule"
    text = inspect.formatannotation(parameter.annotation)
    return " | ".join(part.rpartition(".")[2] for part in text.split(" | "))


def default(value: Any) -> str:
    """The default as one would write it."""
    value = getattr(value, "value", value)  # of a box, see methods/_arguments.py
    name = getattr(value, "__name__", None)
    return f"jnp.{name}" if isinstance(value, type) or name else repr(value)
