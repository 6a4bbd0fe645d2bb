"""Imports point downward, and each layer imports only what it may."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lowrank_optax

PACKAGE = "lowrank_optax"
ROOT = pathlib.Path(__file__).parents[1]

# From the ground up; what stands between commas does not import its neighbours. A file
# belongs to the folder it lies in, so a new one needs no entry.
ORDER = (
    "_checks, _meshes < linalg < quantization < leaves"
    " < projectors, transport, recovery, transforms < bracket"
    " < methods, shapes, layerwise, weights, zeroth_order"
    " < distributed, testing, activations < __init__"
)
LEVEL = {
    unit: level
    for level, row in enumerate(ORDER.split(" < "))
    for unit in row.split(", ")
}
# Activations hang on the codecs alone.
ONLY = {"activations": {"_checks", "_meshes", "quantization"}}

# Third-party modules that only some folders may import; absent means everywhere.
ALLOWED = {
    "flax": set(),
    "orbax": set(),
    "optax": set(LEVEL) - {"linalg", "quantization"},
    "scipy": {"activations/planner"},
    "chex": {"testing"},
    "hypothesis": {"testing"},
    "beartype": set(),
}


def sources(folder):
    """Every Python file below `folder`, as (path relative to it, syntax tree)."""
    base = ROOT / folder
    for path in sorted(base.rglob("*.py")):
        yield path.relative_to(base), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    """Every imported dotted name with its line, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def unit_of(path):
    """`projectors/_svd.py` belongs to the unit `projectors`."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def complaints(path, tree):
    """What this file imports and may not."""
    unit = unit_of(path)
    if unit not in LEVEL:
        yield f"{path}: `{unit}` has no place in ORDER; say where it stands"
        return
    for line, name in imports(tree):
        top, *rest = name.split(".")
        if top == PACKAGE:
            target = rest[0] if rest else "__init__"
            if target == unit or (unit in ONLY and target in ONLY[unit]):
                continue
            if target not in LEVEL:
                yield f"{path}:{line}: {name} goes through the package's front door"
            elif LEVEL[target] >= LEVEL[unit] or unit in ONLY:
                yield f"{path}:{line}: {unit} imports {target}, which is not below it"
        elif top in ALLOWED:
            above = {parent.as_posix() for parent in path.parents}
            if not {unit, *above} & ALLOWED[top]:
                yield f"{path}:{line}: {unit} may not import {top}"


def test_imports_point_downward():
    found = [c for path, tree in sources(PACKAGE) for c in complaints(path, tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("_checks.py", "from lowrank_optax.leaves import moments", "not below"),
        ("projectors/x.py", "import lowrank_optax.bracket.subspace", "not below"),
        ("recovery/x.py", "from lowrank_optax.transport import y", "not below"),
        ("methods/x.py", "from lowrank_optax import svd", "front door"),
        ("methods/x.py", "def f():\n    import flax.nnx", "may not import flax"),
        ("linalg/x.py", "from optax import tree", "may not import optax"),
        ("activations/checkpoint/x.py", "import scipy", "may not import scipy"),
        ("novel.py", "", "no place in ORDER"),
    ],
)
def test_the_walk_sees_a_breach(path, line, complaint):
    found = list(complaints(pathlib.PurePath(path), ast.parse(line)))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("activations/planner/x.py", "import scipy.optimize"),
        ("projectors/x.py", "from lowrank_optax.projectors._protocol import P"),
        ("methods/x.py", "from lowrank_optax.bracket.chain import chain\nimport optax"),
    ],
)
def test_the_walk_lets_pass(path, line):
    assert not list(complaints(pathlib.PurePath(path), ast.parse(line)))


# Modules of the package whose names are public where they stand.
PUBLIC = {"activations", "distributed", "layerwise", "quantization", "testing"}


def private_uses(tree):
    """Names of the package that are not public, used or imported by a tree."""
    aliases = {PACKAGE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname for a in node.names if a.name == PACKAGE and a.asname}
    for line, name in imports(tree):
        top, *rest = name.split(".")
        if top == PACKAGE and rest and (rest[0] not in PUBLIC or "._" in name):
            yield line, name
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
            and (node.attr.startswith("_") or not hasattr(lowrank_optax, node.attr))
        ):
            yield node.lineno, node.attr


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_only_public_names_outside_the_package(folder):
    found = [
        f"{folder}/{path}:{line}: {name}"
        for path, tree in sources(folder)
        for line, name in private_uses(tree)
    ]
    assert not found, "\n".join(found)


def test_private_uses_are_seen():
    tree = ast.parse(
        "import lowrank_optax as lro\n"
        "from lowrank_optax.leaves import moments\n"
        "from lowrank_optax.activations import _private\n"
        "from lowrank_optax.activations import plan_activations\n"
        "lro._checks\nlro.no_such_name\n"
    )
    assert [name for _, name in private_uses(tree)] == [
        "lowrank_optax.leaves.moments",
        "lowrank_optax.activations._private",
        "_checks",
        "no_such_name",
    ]


def test_importing_the_package_loads_no_optional_dependency():
    code = f"import sys, {PACKAGE}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    # JAX itself loads scipy; the packages below only the extras bring.
    assert not loaded & {"flax", "orbax", "chex", "hypothesis", "beartype", "tyro"}
