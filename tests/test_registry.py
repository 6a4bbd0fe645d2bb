"""Whatever lists methods agrees with ``lro.METHODS``, and the face with its folders.

A method is one file, one card, one golden or reference test, and one line in
``methods/__init__.py``. The messages below say what a new one still lacks.
"""

import doctest
import importlib
import inspect
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from benchmarks import state_memory
from docs import hooks
from tests.rows import ROWS

ROOT = pathlib.Path(__file__).parents[1]
METHODS = lro.METHODS.values()


def functions():
    """Every function of every method."""
    return [f for m in METHODS for f in (m.factory, m.direction) if f is not None]


# --- a method is one file, and everything follows ----------------------------------


def test_every_file_is_imported_and_named_for_its_method():
    files = {path.stem for path in (ROOT / "lowrank_optax/methods").glob("[!_]*.py")}
    lacking = files - set(lro.METHODS)
    assert not lacking, (
        f"methods/{lacking} has no method of its name: decorate it with `method`, and "
        "import it in methods/__init__.py"
    )


def test_every_method_is_public():
    lacking = {f.__name__ for f in functions()} - set(dir(lro))
    assert not lacking, f"add the lines of {lacking} to methods/__init__.py"


def test_every_method_has_a_card_and_every_card_a_method():
    cards = {path.stem for path in (ROOT / "docs/methods").glob("*.md")} - {"index"}
    assert cards == set(lro.METHODS), "one docs/methods/NAME.md for every method"
    for name in cards:
        text = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
        assert f"`lro.{name}`" in text, f"docs/methods/{name}.md names no lro.{name}"
        assert lro.METHODS[name].paper in text, f"{name}'s card names no paper"


def test_readme_has_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert hooks.table() in text, "run python docs/hooks.py: it writes the table"


def test_pages_and_navigation_are_filled():
    assert "<!-- functions of methods -->" in (ROOT / "docs/api/methods.md").read_text()
    assert "<!-- table of methods -->" in (ROOT / "docs/methods/index.md").read_text()
    config = types.SimpleNamespace(nav=[{"Methods": "methods/index.md"}])
    (entry,) = hooks.on_config(config).nav
    assert len(entry["Methods"]) == 1 + len(lro.METHODS)
    assert hooks.filled("<!-- functions of methods -->").count(":::") == len(
        functions()
    )


def test_every_method_stands_under_the_laws():
    assert {m.factory for m in METHODS} <= {row.make.func for row in ROWS.values()}


def test_every_method_is_in_the_memory_table():
    listed = {re.split("[, ]", name)[0] for name in state_memory.methods(1)}
    lacking = set(lro.METHODS) - listed
    assert not lacking, f"benchmarks/state_memory.py counts no {lacking}"


def test_every_method_has_a_test_of_its_own():
    """Golden or reference: some test file beyond the laws speaks of it."""
    others = {"rows.py", "chosen.py", "test_registry.py"}
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.name not in others]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = [name for name in lro.METHODS if not re.search(rf"\b{name}\b", text)]
    assert not named, f"no golden or reference test of {named}"


# --- signatures and docstrings -----------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS), ids=lambda m: m.name)
def test_every_argument_is_described_once_and_in_order(method):
    text = inspect.getdoc(method.factory).split("\nArgs:\n")[1].split("\n\n")[0]
    found = re.findall(r"^  (\w+): \S", text, flags=re.MULTILINE)
    assert found == list(inspect.signature(method.factory).parameters)


@pytest.mark.parametrize("method", list(METHODS), ids=lambda m: m.name)
def test_own_descriptions_are_of_own_arguments(method):
    own = method.factory.__wrapped__.__doc__
    section = [*own.split("Args:\n"), ""][1].split("\n\n")[0]
    named = re.findall(r"^ {6}(\w+): ", section, flags=re.MULTILINE)
    assert set(named) <= set(inspect.signature(method.factory).parameters)


@pytest.mark.parametrize("method", list(METHODS), ids=lambda m: m.name)
def test_a_direction_takes_what_its_method_takes(method):
    if method.direction is None:
        pytest.skip("has none")
    all_ = inspect.signature(method.factory).parameters
    kept = inspect.signature(method.direction).parameters
    assert set(all_) - set(kept) == {"learning_rate", "weight_decay", "mask"}
    assert all(kept[name] == all_[name] for name in kept)
    assert f"lro.{method.name}" in method.direction.__doc__


@pytest.mark.parametrize("method", list(METHODS), ids=lambda m: m.name)
def test_the_completed_docstring_has_an_example_that_runs(method):
    text = inspect.getdoc(method.factory)
    test = doctest.DocTestParser().get_doctest(text, {}, method.name, None, None)
    assert test.examples
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


# --- nothing is ignored ------------------------------------------------------------

SVD = lro.svd(rank=4)
ADAM = optax.scale_by_adam()
IGNORED = [
    (lro.galore, {"rank": 16, "projector": SVD}, "rank", "projector"),
    (
        lro.galore,
        {"update_proj_gap": 7, "projector": SVD},
        "update_proj_gap",
        "projector",
    ),
    (
        lro.galore,
        {"basis_dtype": jnp.bfloat16, "projector": SVD},
        "basis_dtype",
        "projector",
    ),
    (lro.galore, {"b1": 0.1, "base_optimizer": ADAM}, "b1", "base_optimizer"),
    (lro.galore, {"eps": 1.0, "base_optimizer": ADAM}, "eps", "base_optimizer"),
    (lro.galore, {"mask": lambda p: p}, "mask", "weight_decay"),
    (lro.adamw_8bit, {"weight_decay": None, "mask": bool}, "mask", "weight_decay"),
    (lro.galore_8bit, {"b2": 0.9, "base_optimizer": ADAM}, "b2", "base_optimizer"),
    (lro.q_galore, {"rank": 4, "projector": SVD}, "rank", "projector"),
    (
        lro.galore_adafactor,
        {"min_parameter_scale": 1.0},
        "min_parameter_scale",
        "multiply_by",
    ),
    (lro.galore_plus, {"head": "mean"}, "head", "heads"),
    (lro.coap, {"normalize": True, "projector": SVD}, "normalize", "projector"),
    (lro.dct_adamw, {"kind": "dct2", "projector": SVD}, "kind", "projector"),
    (lro.dct_adamw, {"error_dtype": jnp.bfloat16}, "error_dtype", "error_feedback"),
    (lro.ldadam, {"error_dtype": jnp.bfloat16}, "error_dtype", "error_feedback"),
    (lro.ldadam, {"rho": 0.5, "projector": SVD}, "rho", "projector"),
    (
        lro.subtrack,
        {"growth_limit": 2.0, "recovery": lro.recover_scale()},
        "growth_limit",
        "recovery",
    ),
    (
        lro.grass_jump,
        {"b1": 0.1, "base_optimizer": ADAM, "transport": lro.keep_moments()},
        "b1",
        "transport",
    ),
    (lro.gwt, {"b1": 0.1, "base_optimizer": ADAM}, "b1", "base_optimizer"),
    (
        lro.gwt,
        {"b2": 0.1, "base_optimizer": ADAM, "normalize": "matrix"},
        "b2",
        "normalize",
    ),
    (lro.sumo, {"steps": 3}, "steps", "orthogonalization"),
    (lro.sumo, {"eps": 1.0, "full": ADAM}, "eps", "full"),
    (
        lro.online_subspace_descent,
        {"cold_start": "svd", "projector": SVD},
        "cold_start",
        "projector",
    ),
    (
        lro.online_subspace_descent,
        {"transport": lro.rotate_moments()},
        "transport",
        "reorthonormalize_every",
    ),
]


@pytest.mark.parametrize(
    ("method", "options", "argument", "other"),
    IGNORED,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_argument_that_would_be_ignored_is_an_error(
    method, options, argument, other
):
    message = rf"lro\.{method.__name__}: `{argument}.*no effect.*{other}.*Drop `"
    with pytest.raises(TypeError, match=message):
        method(1e-3, **options)


def test_what_serves_something_else_as_well_is_no_error():
    lro.subtrack(1e-3, b1=0.8, base_optimizer=ADAM)  # the moments turn by it
    lro.gwt(1e-3, b2=0.99, base_optimizer=ADAM)  # the details are divided by it
    lro.adamw_8bit(1e-3, mask=bool)  # decays by default
    lro.galore(1e-3, mu_dtype=jnp.bfloat16, base_optimizer=ADAM)
    lro.galore(1e-3, rank=128, eps=None, projector=SVD, base_optimizer=ADAM)


@pytest.mark.parametrize("jit", [False, True])
def test_injected_defaults_do_not_count_as_given(jit):
    static = lro.static_args(lro.galore)
    make = optax.inject_hyperparams(lro.galore, static_args=static)
    tx = make(learning_rate=1e-3, projector=SVD, base_optimizer=ADAM)
    params = {"w": jnp.ones((16, 8))}
    init = jax.jit(tx.init) if jit else tx.init
    tx.update(params, init(params), params)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rnk", r"lro\.galore has no argument `rnk`. Did you mean `rank`\?"),
        ("granularity", r"lro\.galore has no .*one of lro\.fira, lro\.apollo"),
        ("zzz", r"lro\.galore has no argument `zzz`. It takes: learning_rate, rank"),
    ],
)
def test_an_unknown_argument_is_named_with_the_function(name, message):
    with pytest.raises(TypeError, match=message):
        lro.galore(1e-3, **{name: 4})


def test_a_direction_speaks_in_its_own_name():
    with pytest.raises(TypeError, match=r"lro\.scale_by_fira has no .*weight_decay"):
        lro.scale_by_fira(4, weight_decay=0.1)
    with pytest.raises(TypeError, match=r"lro\.galore: missing a required argument"):
        lro.galore()


# --- the face ----------------------------------------------------------------------

# The first word of a heading, and the folder whose names stand under it.
FOLDERS = {
    "The bracket": "bracket",
    "Leaves": "leaves",
    "Projectors": "projectors",
    "Transport of moments": "transport",
    "Linear algebra": "linalg",
    "Recovery": "recovery",
    "Transforms": "transforms",
    "Weights in few bits": "weights",
    "Without a backward pass": "zeroth_order",
    "Shapes": "shapes",
    "Methods": "methods",
}


def test_every_name_of_the_face_stands_under_its_folder():
    heading, found = None, 0
    for line in pathlib.Path(lro.__file__).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            heading = re.split("[:;.]", line[2:])[0]
        module = re.match(r"from lowrank_optax\.(\w+)\S* import", line)
        if module:
            found += 1
            assert FOLDERS.get(heading) == module[1], (
                f"{line!r} stands under {heading!r}: move it to its folder's heading"
            )
    assert found > 40


def test_the_face_shows_the_public_names_alone():
    modules = {"activations", "distributed", "layerwise", "quantization", "testing"}
    shown = {n for n in dir(lro) if isinstance(getattr(lro, n), types.ModuleType)}
    assert shown == modules
    assert not [name for name in dir(lro) if name.startswith("_")]
    assert lro.testing is importlib.import_module("lowrank_optax.testing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lro.nothing
