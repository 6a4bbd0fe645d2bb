"""Optimizer state of the LLaMA models, counted: ``python -m benchmarks.state_memory``.

Nothing is allocated or compiled: every number is ``lro.state_bytes`` of the presets'
shapes, or arithmetic on it. The papers' estimates stand beside what they can be
compared with. States are in MiB, the papers' estimates in GB of 10^9 bytes.
"""

import argparse
import dataclasses
import inspect
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.llama.model import abstract_model, count_params
from examples.llama.optimizers import tree_bytes
from examples.llama.presets import PRESETS

GB = 1e9
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
# Ranks of GaLore's table 2; the 7B model's are those of its 8-bit run.
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}

# Weights and states together in GB, as the papers estimate them: GaLore's table 2 and
# Q-GaLore's table 1. At 7B they give measured totals only.
PAPERS = {
    "AdamW": {"60m": 0.36, "130m": 0.76, "350m": 2.06, "1b": 7.80},
    "GaLore": {"60m": 0.24, "130m": 0.52, "350m": 1.22, "1b": 4.38},
    "Q-GaLore": {"60m": 0.18, "130m": 0.39, "350m": 0.88, "1b": 3.08},
}


def methods(rank: int) -> dict[str, optax.GradientTransformation]:
    """Returns name -> optimizer, with defaults but for rank and layers."""

    def low(method: Callable[..., Any], **options: Any) -> Any:
        return method(1e-3, **{"rank": rank, "layer_axis": 0, **options})

    rows = {
        "adamw": optax.adamw(1e-3),
        "adamw_8bit": lro.adamw_8bit(1e-3),
        "galore": low(lro.galore),
        'galore, side="long"': low(lro.galore, side="long"),
        "galore_8bit": low(lro.galore_8bit),
        'galore_8bit, side="long"': low(lro.galore_8bit, side="long"),
        "q_galore": low(lro.q_galore),
        "fira": low(lro.fira),
        "subtrack": low(lro.subtrack),
        "ldadam": low(lro.ldadam),
        "ldadam, error feedback": low(lro.ldadam, error_feedback=True),
        "online_subspace_descent": low(lro.online_subspace_descent),
        "apollo": low(lro.apollo),
        "apollo_mini": low(lro.apollo_mini, rank=1),
        "coap": low(lro.coap),
        "sara": low(lro.sara),
        "dct_adamw": low(lro.dct_adamw),
        "natural_galore": low(lro.natural_galore),
        "galore_plus": low(lro.galore_plus, heads=8),
        "frugal": low(lro.frugal),
        "sumo": low(lro.sumo),
        "gwt, level 2": lro.gwt(1e-3, 2, layer_axis=0),
        "gwt, level 3": lro.gwt(1e-3, 3, layer_axis=0),
        "lora_pre, rank / 8": low(lro.lora_pre, rank=max(1, rank // 8)),
        "muon": lro.muon(1e-3, layer_axis=0),
        "muon, 8 bits": lro.muon(1e-3, bits=8, layer_axis=0),
        "muon, 4 bits": lro.muon(1e-3, bits=4, layer_axis=0),
        "even_muon": lro.even_muon(1e-3, layer_axis=0),
        "even_muon, 4 bits": lro.even_muon(1e-3, bits=4, layer_axis=0),
    }
    # A method without a row above has its plain one.
    listed = {name.partition(",")[0] for name in rows}
    for name in lro.METHODS.keys() - listed:
        factory = lro.METHODS[name].factory
        options = {"rank": rank, "layer_axis": 0}
        taken = inspect.signature(factory).parameters
        rows[name] = factory(1e-3, **{k: options[k] for k in taken if k in options})
    order = ["adamw", *lro.METHODS]
    return dict(sorted(rows.items(), key=lambda r: order.index(r[0].partition(",")[0])))


def shapes(preset: str) -> Any:
    """Returns the shapes of a model's parameters in bfloat16."""
    model = dataclasses.replace(PRESETS[preset].model, param_dtype="bfloat16")
    return abstract_model(model)[1]


def layer_matrices(params: Any) -> Any:
    """Returns the kernels of the layers alone: no norms, embedding or head."""
    flat = jax.tree_util.tree_flatten_with_path(params["layers"])[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
        if leaf.ndim == 3
    }


def state(params: Any, rank: int) -> dict[str, int]:
    """Returns the bytes of state of every method."""
    return {
        name: lro.state_bytes(tx, params).total for name, tx in methods(rank).items()
    }


def with_weights(preset: str) -> dict[str, float]:
    """Returns weights and states together, in GB, for the papers' rows."""
    params = shapes(preset)
    states = state(params, RANKS[preset])
    weights = tree_bytes(params)
    codes = tree_bytes(
        jax.eval_shape(lambda p: lro.quantize_weights(p, layer_axis=0), params)
    )
    return {
        "AdamW": (weights + states["adamw"]) / GB,
        "GaLore": (weights + states["galore"]) / GB,
        "Q-GaLore": (codes + states["q_galore"]) / GB,
    }


def headline() -> dict[str, Any]:
    """Returns the 7B model's layer matrices at rank 1024, and what each saves."""
    matrices = layer_matrices(shapes("7b"))
    bytes_ = state(matrices, 1024)
    return {
        "numbers": sum(leaf.size for leaf in matrices.values()),
        "bytes": bytes_,
        "saved": {name: 1 - x / bytes_["adamw"] for name, x in bytes_.items()},
    }


def muon(rank: int) -> optax.GradientTransformation:
    """Returns Optax's Muon on the layers' matrices; all else has its Adam."""

    def numbers(params: Any) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers((1,), (2,))  # behind the layers
        return jax.tree.map(lambda p: matrix if p.ndim == 3 else None, params)

    del rank
    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)


# What the README compares: name, dtype of the parameters, and the optimizer at a rank.
Counted = Callable[[int], optax.GradientTransformation]
COMPARED: dict[str, tuple[Any, Counted]] = {
    "`optax.adamw`, float32": (jnp.float32, lambda rank: optax.adamw(1e-3)),
    "`optax.adamw`": (jnp.bfloat16, lambda rank: optax.adamw(1e-3)),
    "`optax.contrib.muon`": (jnp.bfloat16, muon),
    "`optax.adafactor`": (jnp.bfloat16, lambda rank: optax.adafactor(1e-3)),
    "`lro.even_muon`": (
        jnp.bfloat16,
        lambda rank: lro.even_muon(1e-3, layer_axis=0),
    ),
    "`lro.adamw_8bit`": (jnp.bfloat16, lambda rank: lro.adamw_8bit(1e-3)),
    "`lro.galore`": (
        jnp.bfloat16,
        lambda rank: lro.galore(1e-3, rank=rank, layer_axis=0),
    ),
    "`lro.galore_8bit`": (
        jnp.bfloat16,
        lambda rank: lro.galore_8bit(1e-3, rank=rank, layer_axis=0),
    ),
    "`lro.gwt`, level 3": (jnp.bfloat16, lambda rank: lro.gwt(1e-3, 3, layer_axis=0)),
    "`lro.apollo_mini`": (
        jnp.bfloat16,
        lambda rank: lro.apollo_mini(1e-3, layer_axis=0),
    ),
}


def compared() -> str:
    """Returns the README's table: GB of weights, gradients and state."""
    rows = []
    for name, (dtype, make) in COMPARED.items():
        cells = [name]
        for size in ("1b", "7b"):
            params = jax.tree.map(
                lambda p, dtype=dtype: jax.ShapeDtypeStruct(p.shape, dtype),
                shapes(size),
            )
            weights = tree_bytes(params)
            states = lro.state_bytes(make(RANKS[size]), params).total
            cells += [f"{states / GB:.1f}", f"{(2 * weights + states) / GB:.1f}"]
        rows.append(cells)
    return table(rows, ["optimizer", "1B: state", "all", "7B: state", "all"])


def table(rows: list[list[str]], head: list[str]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report() -> dict[str, Any]:
    """Counts everything."""
    return {
        "ranks": RANKS,
        "parameters": {name: count_params(shapes(name)) for name in RANKS},
        "state": {name: state(shapes(name), rank) for name, rank in RANKS.items()},
        "totals": {name: with_weights(name) for name in RANKS},
        "layer_matrices_7b": headline(),
    }


def tables(found: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the state, the totals beside the papers', and what 7B's layers save."""
    sizes = list(RANKS)

    def cell(state: dict[str, int], name: str) -> str:
        return f"{state[name] / 2**20:,.0f} ({state[name] / state['adamw']:.2f})"

    by_method = [
        [name, *(cell(found["state"][size], name) for size in sizes)]
        for name in methods(1)
    ]
    against = [
        [
            name,
            *(
                f"{found['totals'][size][name]:.2f} ({paper.get(size, '-')})"
                for size in sizes
            ),
        ]
        for name, paper in PAPERS.items()
    ]
    layers = found["layer_matrices_7b"]
    saved = [
        [name, f"{size / 2**20:,.0f}", f"{100 * layers['saved'][name]:.2f} %"]
        for name, size in layers["bytes"].items()
    ]
    return (
        table(by_method, ["method", *sizes]),
        table(against, ["method", *sizes]),
        table(saved, ["method", "MiB", "saved"]),
    )


def text(found: dict[str, Any]) -> str:
    """Returns the tables with their titles."""
    states, totals, saved = tables(found)
    return "\n\n".join(
        [
            "State in MiB, the whole model, and over optax.adamw's:",
            states,
            "Weights and states in GB, and the paper's estimate:",
            totals,
            "LLaMA-7B, layer matrices, rank 1024, against AdamW in bfloat16:",
            saved,
            "Weights, gradients and state in GB, as the README has it:",
            compared(),
        ]
    )


def renewed(page: str, new: tuple[str, ...]) -> str:
    """Returns a page with its tables, in their order, replaced."""
    old = [t for t in TABLE.findall(page) if t.startswith("| method |")]
    if len(old) != len(new):
        raise ValueError(f"The page has {len(old)} tables of methods, not {len(new)}.")
    for before, after in zip(old, new, strict=True):
        page = page.replace(before, f"{after}\n")
    return page


def main() -> None:
    """Prints the tables, and writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    parser.add_argument("--page", type=pathlib.Path, help="a page with these tables")
    args = parser.parse_args()
    found = report()
    print(text(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.page:
        states, totals, saved = tables(found)
        page = renewed(args.page.read_text(), (saved, states, totals))
        args.page.write_text(page)


if __name__ == "__main__":
    main()
