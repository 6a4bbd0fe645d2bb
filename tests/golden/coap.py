"""COAP's cases: decompositions from the recorded sketches, with the recorded signs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax import quantization
from lowrank_optax.projectors import TwoSidedBasis
from lowrank_optax.projectors.correlation import TwoSidedCorrelation
from tests.golden.cases import Case, Config
from tests.golden.osd import adafactor
from tests.golden.replay import Replay, within_travel

# 25 steps of float32, in another order of summation, through the decompositions.
_TOLERANCE = within_travel(1e-4)


@dataclasses.dataclass(frozen=True, eq=False)
class replayed(lro.correlation):
    """Decomposes the recorded sketch, and takes the recorded signs."""

    sketches: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    used: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

    def for_leaf(self, path):
        own = {"": self.sketches[path]}, {"": self.used[path]}
        return dataclasses.replace(self, sketches=own[0], used=own[1])

    def renew(self, matrix, gradient, old, at):
        sketch = jnp.asarray(self.sketches[""])
        old = jnp.where(at.cold, sketch, old)
        # The first basis is a decomposition like the later ones.
        later = at._replace(cold=jnp.bool_(False))
        new = super().renew(matrix, gradient, old, later)
        recorded = jnp.asarray(self.used[""])[at.count]
        agreement = jnp.sum(new * recorded, axis=0)
        return new * jnp.where(agreement < 0, -1.0, 1.0)

    def align(self, old, new):
        return new


def coap(case: Case) -> Replay:
    """COAP as released, with AdamW or Adafactor."""
    config = case.config
    names = [key[len("projused_") :] for key in case.arrays if key[:9] == "projused_"]
    tall = {name: np.diff(case.params(name).shape[1:])[0] <= 0 for name in names}
    used = {
        name: case.arrays[f"projused_{name}"].swapaxes(1, 2)
        if tall[name]
        else case.arrays[f"projused_{name}"]
        for name in names
    }
    projector = replayed(
        config["rank"],
        sketches={name: case.arrays[f"proj_{name}"][0] for name in names},
        used=used,
        **_schedule(config),
    )
    numbers = lro.MatrixDimensionNumbers(1, 0)
    options = {"select": lambda path, leaf: path in names}
    return _replay(case, projector, weight_dimension_numbers=numbers, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayedTucker(TwoSidedCorrelation):
    """Takes the recorded decompositions; steps by itself where the code did.

    The second step after a decomposition had the first one's gradient added to its
    own, so that one is taken as recorded, too.
    """

    used: Any = None

    def refresh(self, matrix, gradient, stored, at):
        recorded = TwoSidedBasis(*(jnp.asarray(x)[at.count] for x in self.used))
        later = at._replace(cold=jnp.bool_(False))
        own = super().refresh(matrix, gradient, stored, later)
        first_step = at.epoch % self.left.reproject_factor == 1
        return TwoSidedBasis(
            *(jnp.where(first_step, a, b) for a, b in zip(own, recorded, strict=True))
        )

    def align(self, old, new):
        return new


@dataclasses.dataclass(frozen=True, eq=False)
class replayed_tucker(lro.correlation):
    """The projector that is replayed on both sides."""

    used: Any = dataclasses.field(default=None, kw_only=True)

    def both(self):
        gap = self.update_proj_gap
        return ReplayedTucker(self.rank, gap, left=self, right=self, used=self.used)


def coap_tucker2(case: Case) -> Replay:
    """COAP on a convolution as released."""
    config = case.config
    rank, other = config["ranks"]
    config.get("rank_ratio_cnn")
    if rank != other:
        raise ValueError("Only one rank for both sides was recorded.")
    used = case.arrays["projused0_conv"], case.arrays["projused1_conv"]
    projector = replayed_tucker(rank, used=used, **_schedule(config))
    # torch's kernels are (out, in, height, width).
    numbers = lro.MatrixDimensionNumbers(1, 0, shared_axis=(2, 3))
    return _replay(case, projector, side="both", weight_dimension_numbers=numbers)


def _schedule(config: Config) -> dict[str, Any]:
    return {
        "update_proj_gap": config["update_interval"],
        "reproject_factor": config["reproject_factor"],
        "learning_rate": config.get("proj_lr", 0.1),
        "clip": config.get("proj_grad_clip_norm", 1.0),
        "normalize": False,
        "cold_start": "svd",
    }


@dataclasses.dataclass(frozen=True)
class looked_up(quantization.blockwise_int8):
    """The recorded CPU kernel's codes: of the nearest of 65536 equal steps in [-1, 1].

    Found from `codes_bnbcpu_*` of quant8_blockwise, of which it gives all but one.
    """

    def code(self, x, scale, zero, draws):
        steps = jnp.floor(x / jnp.where(scale > 0, scale, 1.0) * 32767.5 + 32768.0)
        return super().code((steps / 32767.5 - 1.0) * scale, scale, zero, draws)


def _eight_bit(config: Config, betas: dict[str, Any]) -> optax.GradientTransformation:
    """Both moments in the signed map, every matrix one block, in whatever order."""
    if "blocksize 4096, dynamic signed map for BOTH" not in config["quantiser"]:
        raise ValueError("Only one quantizer was recorded.")
    codec = looked_up(4096, blocks="flat")
    raw = lro.scale_by_raw_adam(**betas)
    corrected = lro.scale_by_bias_correction(betas["b1"], betas["b2"])
    return optax.chain(lro.quantize_state(raw, codec, codec, min_size=0), corrected)


def _replay(case: Case, projector: lro.Projector, **options: Any) -> Replay:
    config, hparams = case.config, case.config["inner_hparams"]
    for remark in ("f32_vs_f64_max_abs_dev_and_travel", "omega_seed"):
        config.get(remark)
    rate, decay = config["learning_rate"], config["weight_decay"] or None
    options |= {"projector": projector, "scale": config["scale"]}
    transport = lro.keep_moments()
    if config["restore_state"]:
        transport = lro.rotate_moments(form="root")
    if config["inner"] == "adafactor":
        # The projector reads the momentum of the scaled updates: not negated there.
        inner = adafactor(hparams, lambda count: -rate)
        tx = lro.scale_by_coap(base_optimizer=inner, transport=transport, **options)
        tx = optax.chain(tx, optax.scale(-1.0))
    else:
        betas = {key: hparams[key] for key in ("b1", "b2", "eps")}
        if not hparams["bias_correction"]:
            raise ValueError("Only bias-corrected runs were recorded.")
        if config["inner"] == "adamw8bit":
            options["base_optimizer"] = _eight_bit(config, betas)
        else:
            options |= betas
        tx = lro.coap(
            rate,
            weight_decay=decay,
            transport=transport,
            conventions="authors",
            **options,
        )
    return Replay(tx, _TOLERANCE, lambda state: {}, _TOLERANCE)
