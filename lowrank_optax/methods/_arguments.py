"""``checked``: a method's signature, and the refusal of arguments that do not fit."""

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lowrank_optax.bracket.chain import project
from lowrank_optax.methods._docstring import entries_of, sections_of
from lowrank_optax.methods._registry import METHODS
from lowrank_optax.methods._shared import COMMON, Arg, Leaves, Options

# What one argument takes over from others, in every method that has all of them.
IGNORED = (
    "rank, update_proj_gap, basis_dtype, renew_below beside projector",
    "b1, b2, eps beside base_optimizer",
    "growth_limit, entry_limit beside recovery",
    "entry_limit, renew_below, match beside conventions",
    "scale beside match",
    "mask without weight_decay",
)
# What other libraries call an argument, and what it is called here.
RENAMED = {
    "lr": "write learning_rate=",
    "galore_scale": "write scale=",
    "alpha": "write scale=",
    "betas": "write b1= and b2=, one number each",
    "beta1": "write b1=",
    "beta2": "write b2=",
    "epsilon": "write eps=",
    "wd": "write weight_decay=",
    "decay": "write weight_decay=",
    "proj_type": 'write side=, where "std" is "short", "reverse_std" is "long" and '
    '"full" is "both"',
    "proj": "write projector=, such as lro.svd(rank=8)",
    "proj_gap": "write update_proj_gap=",
    "gap": "write update_proj_gap=",
    "r": "write rank=",
    "scale_type": 'write granularity=, where "channel" is "column"',
    "optim_target_modules": "write select=, what the leaves' paths contain",
    "target_modules": "write select=, what the leaves' paths contain",
    "params": "parameters go to init and update: tx.init(params)",
    "model": "parameters go to init and update: tx.init(params)",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Fixed:
    """The default of an argument that is no number to tune.

    ``optax.inject_hyperparams`` makes arrays of all ints and schedules of all
    callables, defaults included; what stands in such a box it hands on as it is.
    """

    value: Any

    def __repr__(self) -> str:
        """Reads like the value itself, in ``help()`` and signatures."""
        return repr(self.value)


def plain(value: Any) -> Any:
    """Returns what is in the box, or a value that is in none."""
    return value.value if isinstance(value, Fixed) else value


def complete(
    recipe: Callable[..., Any], defaults: Mapping[str, Any]
) -> tuple[inspect.Signature, dict[str, str]]:
    """Lists the shared arguments in place of ``**options``, and their texts."""
    own = inspect.signature(recipe)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    # First what the groups say, for a method that lists such an argument itself.
    texts = _texts(Options) | COMMON
    given = [p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD]
    if given:
        # The annotation is `Unpack[Group]`; `include_extras` keeps the default and the
        # text, which Python would drop from the types.
        (shared,) = typing.get_args(given[0].annotation)
        hints = typing.get_type_hints(shared, include_extras=True)
        parts, leaves = inspect.signature(project).parameters, Leaves.__annotations__
        mine = {p.name for p in parameters}
        told = entries_of(sections_of(project.__doc__ or "")["Args"])
        texts |= {name: text for name, text in told.items() if name not in mine}
        # Those of ``lro.project`` come last.
        for name, hint in sorted(hints.items(), key=lambda pair: pair[0] in leaves):
            default = parts[name].default if name in parts else None
            if typing.get_origin(hint) is typing.Annotated:
                hint, (arg,) = hint.__origin__, hint.__metadata__
                assert isinstance(arg, Arg)
                default, texts[name] = arg.default, arg.text
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(name, default),
                    annotation=hint,
                )
            )
    return own.replace(parameters=parameters), texts


def boxed(signature: inspect.Signature) -> inspect.Signature:
    """Puts defaults into boxes that would otherwise be injected.

    Not those of ranks and gaps, which everybody who injects says are static.
    """

    def box(p: inspect.Parameter) -> inspect.Parameter:
        tuned = float in typing.get_args(p.annotation) or p.annotation is float
        injected = type(p.default) is int or callable(p.default)
        named = p.name in ("rank", "update_proj_gap", "learning_rate")
        if tuned or named or p.default is p.empty or not injected:
            return p
        return p.replace(default=Fixed(p.default))

    return signature.replace(parameters=[*map(box, signature.parameters.values())])


def _texts(group: Any) -> dict[str, str]:
    hints = typing.get_type_hints(group, include_extras=True)
    return {
        name: arg.text
        for name, hint in hints.items()
        for arg in getattr(hint, "__metadata__", ())
    }


def rules_of(
    signature: inspect.Signature, ignored: Iterable[str], uses: Iterable[str]
) -> list[tuple[str, str, list[str]]]:
    """Returns (argument, "beside" or "without", others) for what may be ignored."""
    found, settled = [], set(uses)
    for rules in (ignored, IGNORED):
        for rule in rules:
            arguments, word, others = re.split(r" (beside|without) ", rule)
            for argument in arguments.split(", "):
                names = others.split(", ")
                if {argument, *names} <= set(signature.parameters):
                    if argument not in settled or rules is not IGNORED:
                        found.append((argument, word, names))
        # A method's own rules come first, and replace the common ones of an argument.
        settled |= {argument for argument, *_ in found}
    return found


def checked(
    recipe: Callable[..., Any],
    called: str,
    signature: inspect.Signature,
    rules: list[tuple[str, str, list[str]]],
) -> Any:
    @functools.wraps(recipe)
    def call(*args: Any, **kwargs: Any) -> Any:
        # In front of `bind`, whose message could suggest no other name.
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown:
            raise TypeError(_unknown(called, unknown[0], signature))
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{called}: {error}.") from None
        _check_values(called, bound)
        for argument, word, others in rules:
            if not _given(bound, argument):
                continue
            names = " and ".join(f"`{name}`" for name in others)
            if word == "beside" and all(_given(bound, name) for name in others):
                raise TypeError(
                    f"{called}: `{argument}` has no effect beside {names}. "
                    f"Drop `{argument}`, or drop `{others[0]}`."
                )
            if word == "without" and not any(_acts(bound, name) for name in others):
                raise TypeError(
                    f"{called}: `{argument}` has no effect without {names}. "
                    f"Drop `{argument}`, or give {names}."
                )
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = plain(value)
        return recipe(*bound.args, **bound.kwargs)

    make: Any = call
    make.__signature__ = signature
    return make


def _unknown(called: str, name: str, signature: inspect.Signature) -> str:
    message = f"{called} has no argument `{name}`."
    if name in RENAMED:
        return f"{message} Here, {RENAMED[name]}."
    close = difflib.get_close_matches(name, signature.parameters, n=1)
    if close:
        return f"{message} Did you mean `{close[0]}`?"
    having = [
        f"lro.{other.name}"
        for other in METHODS.values()
        if name in inspect.signature(other.factory).parameters
    ]
    if having:
        return f"{message} It is one of {', '.join(having)}."
    return f"{message} It takes: {', '.join(signature.parameters)}."


def _check_values(called: str, bound: inspect.BoundArguments) -> None:
    """Raises where something else stands in a number's place."""
    for name, value in bound.arguments.items():
        hint = bound.signature.parameters[name].annotation
        kinds = typing.get_args(hint) or (hint,)
        if float in kinds and not (value is None and type(None) in kinds):
            _check_number(called, name, plain(value), kinds)
    rate, rank = (bound.arguments.get(n) for n in ("learning_rate", "rank"))
    whole = isinstance(rate, int) and not isinstance(rate, bool) and rate > 1
    if whole and isinstance(rank, float):
        raise TypeError(
            f"{called}: learning_rate={rate} and rank={rank} seem to have changed "
            f"places. The learning rate comes first: learning_rate={rank}, rank={rate}."
        )


def _check_number(called: str, name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    schedule = any(typing.get_origin(kind) is Callable for kind in kinds)
    wanted = "a number or a schedule" if schedule else "a number"
    hint = f"Write {name}=0.1, say."
    if isinstance(value, str):
        if str in kinds:  # a choice, checked where it is used
            return
        hint = "Write it without quotes."
    elif isinstance(value, list | tuple) and not hasattr(value, "init"):
        hint = "Write one number."
        if name in ("b1", "b2"):
            hint = "Write b1 and b2 apart, one number each."
    elif hasattr(value, "init"):
        hint = "A transformation stands in a chain: optax.chain(first, second)."
    elif isinstance(value, dict):
        hint = "Parameters go to init and update: tx.init(params)."
    elif isinstance(value, bool) or value is None:
        pass
    elif callable(value) and not schedule:
        hint = (
            "It has no schedule of its own: optax.inject_hyperparams(fn, "
            f"static_args=lro.static_args(fn))(..., {name}=schedule) gives it one."
        )
    else:
        return  # numbers, arrays, tracers, schedules, and what acts like one
    raise TypeError(
        f"{called}: `{name}` must be {wanted}, got {_short(value)} of type "
        f"{type(value).__name__}. {hint}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _given(bound: inspect.BoundArguments, name: str) -> bool:
    """Whether an argument has another value than its default.

    ``optax.inject_hyperparams`` passes the defaults of all arguments, the numbers as
    arrays. A traced number's value is unknown: it counts as the default.
    """
    default = plain(bound.signature.parameters[name].default)
    value = plain(bound.arguments.get(name, default))
    if isinstance(value, jax.Array) and isinstance(default, float | int):
        if isinstance(value, Tracer):
            return False
        # In the dtype of the array: 0.999 in float32 is another number than Python's.
        return bool(np.any(np.asarray(value) != np.asarray(default, value.dtype)))
    if isinstance(value, jax.Array):
        return True
    return value is not default and bool(np.any(value != default))


def _acts(bound: inspect.BoundArguments, name: str) -> bool:
    """Whether an argument does something: a float does at its default, too."""
    default = plain(bound.signature.parameters[name].default)
    value = plain(bound.arguments.get(name, default))
    if value is None or value is False:
        return False
    return isinstance(default, float) or _given(bound, name)
