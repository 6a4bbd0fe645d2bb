"""Bytes of weights, gradient and state: ``python -m benchmarks.bytes_per_parameter``.

Counted from the shapes of a preset, for every method, nothing allocated: what lies in
memory at the fullest moment of a step beside activations, over the parameters' number.

* weights: float32, bfloat16, or split (bfloat16 with a correction in the state);
* state: as the method keeps it, or with the moments of its Adam in 8 or 4 bits
  (``lro.adamw_8bit`` and ``lro.adamw_4bit``; in a bracket, by ``base_optimizer``);
* gradient: of all parameters in the weights' type, or layer-wise of one layer, or of
  the largest leaf outside of layers, whichever is more.
"""

import argparse
import inspect
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from benchmarks.state_memory import RANKS, shapes, table
from examples.llama.model import count_params
from examples.llama.optimizers import correction_of
from lowrank_optax.quantization import companded

WEIGHTS = ("float32", "bfloat16", "split")
BITS = ("plain", "8-bit", "4-bit")
ADAM = {
    "8-bit": lambda: lro.quantize_state(optax.scale_by_adam()),
    "4-bit": lambda: lro.quantize_state(
        optax.scale_by_adam(),
        companded(32, bits=4),
        companded(32, signed=False, bits=4),
        stochastic=True,
    ),
}
# AdamW elsewhere: bits of a code, numbers per float32 scale, and whether a tensor that
# blocks do not divide stays whole, as documented: bitsandbytes' `AdamW8bit`
# (`min_8bit_size=4096`) and torchao's `AdamW8bit` and `AdamW4bit` (`torchao/optim`).
ELSEWHERE = {
    "bitsandbytes, AdamW8bit": (8, 256, False),
    "torchao, AdamW8bit": (8, 256, True),
    "torchao, AdamW4bit": (4, 128, True),
}
LEAST = 4096  # numbers of a tensor, below which both keep it as it is
FULL = {"plain": optax.adamw, "8-bit": lro.adamw_8bit, "4-bit": lro.adamw_4bit}


def optimizer(name: str, bits: str, rank: int) -> Any:
    """A method with its moments in so many bits, None where it has no such form."""
    if name == "adamw":
        return FULL[bits](1e-3)
    factory = lro.METHODS[name].factory
    taken = inspect.signature(factory).parameters
    options: dict[str, Any] = {"layer_axis": 0, "rank": rank}
    if name == "apollo_mini":
        options["rank"] = 1
    if bits != "plain":
        if "base_optimizer" not in taken:
            return None
        options["base_optimizer"] = ADAM[bits]()
    given = {key: value for key, value in options.items() if key in taken}
    try:
        return factory(1e-3, **given)
    except (TypeError, ValueError):  # its Adam cannot be exchanged
        return None


def count(name: str, preset: str) -> dict[str, Any]:
    """Bytes per parameter by weights, bits, and whether the step is layer-wise."""
    params, rank = shapes(preset), RANKS[preset]
    number = count_params(params)
    layers = jax.tree.leaves(params["layers"])
    one = sum(leaf.size // leaf.shape[0] for leaf in layers)
    rest = [leaf.size for key, x in params.items() if key != "layers"
            for leaf in jax.tree.leaves(x)]  # fmt: skip
    part = max(one, *rest) / number
    split = lro.split_weights(optax.identity(), correction_of)
    correction = lro.state_bytes(split, params).total
    found: dict[str, Any] = {}
    for bits in BITS:
        tx = optimizer(name, bits, rank)
        for weights in WEIGHTS:
            if tx is None:
                found[f"{weights}, {bits}"] = None
                continue
            # Behind the corrections the optimizer sees float32 weights.
            seen = jnp.bfloat16 if weights == "bfloat16" else jnp.float32
            like = jax.tree.map(
                lambda x, seen=seen: jax.ShapeDtypeStruct(x.shape, seen), params
            )
            key = f"{weights}, {bits}"
            if weights == "split":
                state = found[f"float32, {bits}"]["state"] + correction / number
            else:
                state = lro.state_bytes(tx, like).total / number
            each = 4 if weights == "float32" else 2
            found[key] = {
                "state": state,
                "whole": each + state + each,
                "layer-wise": each + state + each * part,
            }
    return found


def elsewhere(preset: str, name: str) -> dict[str, Any]:
    """Bytes per parameter of bfloat16 weights with another library's AdamW.

    By formula, of a model in which every layer has tensors of its own: two moments in
    codes with a scale per block; those of smaller tensors in float32 where blocks may
    be short, else in the weights' type. Tables of levels are not counted.
    """
    bits, block, even = ELSEWHERE[name]
    params = shapes(preset)
    tensors = [
        (x.size // x.shape[0], x.shape[0]) for x in jax.tree.leaves(params["layers"])
    ]
    rest = {key: x for key, x in params.items() if key != "layers"}
    tensors += [(x.size, 1) for x in jax.tree.leaves(rest)]
    each = 2  # bytes of a weight, and of its gradient
    state = 0
    for size, times in tensors:
        if size < LEAST or (even and size % block):
            one = (each if even else 4) * size
        else:
            one = size * bits // 8 + 4 * -(-size // block)
        state += 2 * one * times
    number = count_params(params)
    return {"state": state / number, "whole": each + state / number + each}


def report(preset: str, only: list[str]) -> dict[str, Any]:
    """Counts every method."""
    names = [name for name in ("adamw", *lro.METHODS) if not only or name in only]
    # Forms of another row in fewer bits.
    names = [n for n in names if n not in ("adamw_8bit", "adamw_4bit", "galore_8bit")]
    return {name: count(name, preset) for name in names}


def text(found: dict[str, Any]) -> str:
    """One row per method; in a cell the whole gradient / the layer-wise step."""

    def cell(row: Any) -> str:
        return f"{row['whole']:.2f} / {row['layer-wise']:.2f}" if row else "-"

    columns = [f"{weights}, {bits}" for weights in WEIGHTS for bits in BITS]
    rows = [[name, *(cell(row[key]) for key in columns)] for name, row in found.items()]
    return table(rows, ["bytes a parameter", *columns])


def main() -> None:
    """Prints the table, and writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="1b", choices=sorted(RANKS))
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    found = report(args.preset, args.only)
    print(text(found))
    others = {name: elsewhere(args.preset, name) for name in ELSEWHERE}
    rows = [
        [name, f"{row['state']:.2f}", f"{row['whole']:.2f}"]
        for name, row in others.items()
    ]
    print(table(rows, ["bfloat16 weights", "state", "with weights and gradient"]))
    if args.out:
        known = {
            "preset": args.preset,
            "rank": RANKS[args.preset],
            "methods": found,
            "elsewhere": others,
        }
        args.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
