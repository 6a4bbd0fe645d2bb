"""Shows a method with all its arguments and defaults, as `help()` does.

Methods pass most of their arguments on as `**options` and list them in
`__signature__`, which reading the source alone does not find.
"""

import importlib
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Completes the parameters of the functions in `lowrank_optax.methods`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Puts into the parameters what the running function lists in addition."""
        del kwargs
        if pkg.path != "lowrank_optax":
            return
        shared = options_of(pkg["_chain.project"])
        for function in pkg["methods._tracked"].functions.values():
            if not function.is_alias:
                shared |= named(function)
        for module in pkg["methods"].modules.values():
            complete(module, shared)


def complete(module: griffe.Module, known: dict[str, griffe.Parameter]) -> None:
    """A method's options are shared, or those of a function of its module.

    Of modules that it imports methods from, too: theirs may be passed on.
    """
    live = importlib.import_module(module.path)
    functions = [f for f in module.functions.values() if not f.is_alias]
    for function in [*imported(module), *functions]:
        known = known | named(function)
    for function in functions:
        signature = getattr(getattr(live, function.name), "__signature__", None)
        if signature is None:
            continue
        own = named(function)
        rest = [p for p in function.parameters if p.name not in own]
        merged = [own.get(name) or known[name] for name in signature.parameters]
        function.parameters = griffe.Parameters(*merged, *rest)


def imported(module: griffe.Module) -> list[griffe.Function]:
    """The functions of the modules of methods whose functions a module imports.

    And of those that these import: options are passed on more than once.
    """
    package = module.package
    homes = {
        f.target_path.rpartition(".")[0].removeprefix(f"{package.path}.")
        for f in module.members.values()
        if isinstance(f, griffe.Alias)
    }
    found = []
    for home in sorted(homes):
        if home.startswith("methods.") and not home.startswith("methods._"):
            found += imported(package[home])
            found += [f for f in package[home].functions.values() if not f.is_alias]
    return found


def named(function: griffe.Function) -> dict[str, griffe.Parameter]:
    """The parameters save `**options`."""
    kept = (p for p in function.parameters if p.name != "options")
    return {parameter.name: parameter for parameter in kept}


def options_of(part: griffe.Class) -> dict[str, griffe.Parameter]:
    """The fields of a dataclass as keyword arguments."""
    return {
        name: griffe.Parameter(
            name,
            annotation=field.annotation,
            kind=griffe.ParameterKind.keyword_only,
            default=field.value,
        )
        for name, field in part.attributes.items()
    }
