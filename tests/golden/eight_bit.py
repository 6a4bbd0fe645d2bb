"""8-bit GaLore's cases: moments as released codes, block by block."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax import quantization
from tests.golden.cases import Case
from tests.golden.galore import bracket, on_the_right
from tests.golden.replay import Replay


@dataclasses.dataclass(frozen=True)
class turned(quantization.blockwise_int8):
    """Blocks in the row-major order of the transpose, as torch's [m, r] has them."""

    def encode(self, x, key=None):
        return super().encode(x.swapaxes(-1, -2), key)

    def decode(self, encoded, shape):
        *batch, m, n = shape
        return super().decode(encoded, (*batch, n, m)).swapaxes(-1, -2)


def galore_adamw8bit(case: Case) -> Replay:
    """GaLore on bitsandbytes' AdamW, with the package's exact quantizer."""
    config = case.config
    if config["min_8bit_size"] > 4096:
        raise ValueError("Another rule of sizes was recorded.")
    config.get("kernel")
    (b1, b2), eps = config["betas"], config["eps"]

    def optimizer(codec: Any) -> optax.GradientTransformation:
        options = {"block": config["block_size"], "blocks": "flat"}
        signed = codec(signed=True, **options)
        unsigned = codec(signed=False, keep_nonzero=False, **options)
        adam = optax.scale_by_adam(b1, b2, eps)
        inner = lro.quantize_state(adam, signed, unsigned, config["min_8bit_size"])
        return lro.galore(
            config["learning_rate"], base_optimizer=inner, **bracket(case)
        )

    tall = {n: on_the_right("std", case.params(n).shape[1:]) for n in _projected(case)}
    tx = optax.partition(
        {True: optimizer(turned), False: optimizer(quantization.blockwise_int8)},
        {name: tall.get(name, False) for name in case.names},
    )

    def finals(state: Any) -> dict[str, jax.Array]:
        found = {}
        for name in case.names:
            inner = state.inner_states[tall.get(name, False)].inner_state
            for i, field in ((1, "mu"), (2, "nu")):
                moment: Any = optax.tree_utils.tree_get(inner, field)[name]
                if quantization.is_quantized(moment):
                    found[f"state{i}_{name}"] = moment.codes
                    found[f"absmax{i}_{name}"] = moment.scales
                else:
                    found[f"state{i}_{name}"] = moment.T if name in tall else moment
        return found

    measure = functools.partial(_params, max(config["scale"] / 0.25, 1.0))
    return Replay(tx, measure, finals, _moments)


def _projected(case: Case) -> list[str]:
    return case.config["projected_params"]


def _params(unit, got, want, travel):
    """1e-6; of 500 entries one may have met a tie of two codes, worth up to 6e-4.

    That is at the scale 0.25, to which a larger one is ``unit``.
    """
    del travel
    errors = np.abs(got - want) / unit
    return max(np.mean(errors > 1e-6) / 0.002, errors.max() / 6e-4)


def _moments(got, want, reference):
    """Codes: the same ties, one level each. Numbers: rounding."""
    del reference
    errors = np.abs(got - want.astype(np.float32))
    if want.dtype == np.uint8:
        return max(np.mean(errors > 0) / 0.002, errors.max())
    return float(errors.max() / (1e-5 * np.abs(want).max()))
