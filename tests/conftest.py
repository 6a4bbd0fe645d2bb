"""Set-up that must happen before JAX, or the package, is imported."""

import atexit
import gc
import importlib.metadata
import itertools
import os
import shutil
import sys
import tempfile

assert "jax" not in sys.modules, "JAX was imported before its flags were set"

# Eight devices on the CPU: what is sharded is tested without an accelerator. Most of
# the time goes into compiling, so machine code is left as it comes, and is made by the
# older of two emitters, in a third of the time: the passes over HLO, with their
# fusions, buffers and collectives, are the usual ones.
_quick = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Known to be there. XLA ends a process that names a flag it does not know.
    _quick += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        *_quick,
        os.environ.get("XLA_FLAGS", ""),  # the later one counts
        "--xla_force_host_platform_device_count=8",
    ]
)

# What one test or worker of a run has compiled, the others read: a folder for this run
# alone, whose name the workers and the programs that tests start inherit.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="lowrank_optax_programs_")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import jaxtyping

# Annotated functions of these folders check their arguments' shapes and dtypes while
# the tests run; users do not pay for it. Elsewhere an array is an `Array` and no more,
# which the type checker sees, and checks made anew for every inner function took a
# third of the time of the tests.
CHECKED = ("linalg", "quantization", "projectors", "recovery", "transport")
jaxtyping.install_import_hook(
    [f"lowrank_optax.{folder}" for folder in CHECKED], "beartype.beartype"
)

# A compilation may take a second: no deadline. The same examples on every run of
# continuous integration, new ones at the desk.
hypothesis.settings.register_profile("desk", deadline=None, max_examples=20)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=20, derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_configure(config):
    # Two workers at the same program: one may read what the other is still writing,
    # which does not decode, and then compiles it itself.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error reading persistent compilation cache entry"
    )


def pytest_collection_modifyitems(items):
    """Puts the tests of one row side by side: what they share is compiled once."""
    first = {}

    def place(numbered):
        number, item = numbered
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        return first.setdefault(row, number) if isinstance(row, str) else number

    items[:] = [item for _, item in sorted(enumerate(items), key=place)]


# Every compiled program takes some of a process' memory maps, of which Linux allows
# 65,530: a worker that keeps all programs of 1,500 tests dies in the compiler.
_FINISHED = itertools.count(1)
_KEEP = 100


def pytest_runtest_teardown():
    if next(_FINISHED) % _KEEP == 0:
        jax.clear_caches()
        gc.collect()
