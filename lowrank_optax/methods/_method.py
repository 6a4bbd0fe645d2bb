"""``method``: turns a recipe into a public method, and enters it into ``METHODS``.

A recipe is one function: the arguments of its own, ``**options`` for those of
``_shared``, and a body that composes the stages. The decorator lists every argument in
the signature and in the docstring, and refuses what the method would ignore.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from lowrank_optax.bracket.chain import project
from lowrank_optax.methods._shared import COMMON, Arg, Leaves, Options

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")

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
# A scale_by_ form leaves these to its method.
STEP = ("learning_rate", "weight_decay", "mask")


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


_methods: dict[str, Method] = {}
METHODS: Mapping[str, Method] = types.MappingProxyType(_methods)
"""Every method, by name and in the order of the tables; see ``lro.Method``."""


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
        signature, texts = _complete(recipe, defaults or {})
        signature = _boxed(signature)
        rules = _rules(signature, ignored, uses)
        make = _checked(recipe, f"lro.{name}", signature, rules)
        source = f"{reference}, https://arxiv.org/abs/{paper}"
        make.__doc__ = _document(name, recipe.__doc__ or "", signature, texts, source)
        make._rules = rules
        _methods[name] = Method(name, title, paper, reference, make)
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
    make = _checked(recipe, f"lro.{name}", signature, rules)
    del make.__wrapped__
    title = _methods[full.__name__].title
    make.__doc__ = (
        f"The direction of {title}: ``lro.{full.__name__}`` without its learning rate "
        "and weight decay.\n\nThe arguments are those of "
        f"``lro.{full.__name__}``, to be read there. The result is not negated: "
        "``optax.scale_by_learning_rate`` stands behind it in an ``optax.chain``.\n"
    )
    _methods[full.__name__] = dataclasses.replace(
        _methods[full.__name__], direction=make
    )
    return make


def recipe_of(method: F) -> F:
    """Returns a method's recipe, for another to build on: nothing is checked twice."""
    return typing.cast(Any, inspect.unwrap(method))


# --- signature and checks ----------------------------------------------------------


def _complete(
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
        told = _entries(_sections(project.__doc__ or "")["Args"])
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


def _boxed(signature: inspect.Signature) -> inspect.Signature:
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


def _rules(
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


def _checked(
    recipe: Callable[..., Any],
    called: str,
    signature: inspect.Signature,
    rules: list[tuple[str, str, list[str]]],
) -> Any:
    @functools.wraps(recipe)
    def checked(*args: Any, **kwargs: Any) -> Any:
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

    make: Any = checked
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
        for other in _methods.values()
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


# --- docstrings --------------------------------------------------------------------

_ORDER = (
    "Args",
    "Returns",
    "Raises",
    "Examples",
    "References",
    "Differences from the authors' code",
)
_RETURNS = "  The transformation."
_EXAMPLE = """\
  >>> import jax.numpy as jnp, lowrank_optax as lro
  >>> params = {{"kernel": jnp.ones((64, 32))}}
  >>> tx = lro.{name}(learning_rate=1e-3{size})
  >>> updates, state = tx.update(params, tx.init(params), params)"""
_RAISES = """\
  TypeError: if an argument is unknown or would have no effect beside another, or one
    that fixes shapes is not a Python number.
  ValueError: if a number is out of range or a choice is unknown; at init, if a leaf
    selected explicitly cannot be projected."""


def _document(
    name: str,
    doc: str,
    signature: inspect.Signature,
    texts: Mapping[str, str],
    source: str,
) -> str:
    """Completes a docstring: all arguments in order, what follows, the paper."""
    sections = _sections(doc)
    own = _entries(sections.get("Args", ""))
    lines = []
    for argument in signature.parameters:
        text = " ".join((own.get(argument) or texts.get(argument, "")).split())
        lines += textwrap.wrap(
            f"{argument}: {text}",
            84,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    sections["Args"] = "\n".join(lines)
    sections.setdefault("Returns", _RETURNS)
    size = ", rank=4" if "rank" in signature.parameters else ""
    sections.setdefault("Examples", _EXAMPLE.format(name=name, size=size))
    sections["Raises"] = "\n".join(filter(None, [_RAISES, sections.get("Raises")]))
    paper = textwrap.fill(
        source,
        84,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    sections["References"] = "\n".join(
        filter(None, [paper, sections.get("References")])
    )
    parts = [sections[""]]
    parts += [f"{title}:\n{sections[title]}" for title in _ORDER if title in sections]
    return "\n\n".join(parts) + "\n"


def _sections(doc: str) -> dict[str, str]:
    """Returns the text before the first heading under "", and each section's."""
    headings = "|".join(map(re.escape, _ORDER))
    pieces = re.split(rf"^({headings}):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    pairs = zip(["", *pieces[1::2]], pieces[::2], strict=True)
    return {name: text.rstrip() for name, text in pairs}


def _entries(section: str) -> dict[str, str]:
    """Returns argument -> description of an ``Args`` section."""
    entries = re.split(r"^(\w+): ", textwrap.dedent(section), flags=re.MULTILINE)
    return dict(zip(entries[1::2], entries[2::2], strict=True))
