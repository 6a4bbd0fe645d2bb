"""GWT's cases: from the recorded hyperparameters to this library's arguments."""

import functools
from typing import Any

import jax
import optax

import lowrank_optax as lro
from tests.golden.cases import Case
from tests.golden.replay import Replay, within, within_share, within_travel

# Well-conditioned gradients; at most 2.1e-7 was measured.
_TAME = within(1e-6)
# Sign-random gradients divide details by almost nothing: single weights travel 15 to
# 140, and what counts is the error as a share of that.
_ROUGH = within_travel(1e-4)


def gwt(case: Case) -> Replay:
    """GWT on Adam or Adafactor, or the code's plain AdamW, as released."""
    config = case.config
    tame = case.config["gradients"] != "gradients_wavelet_rough.npz"
    make = {"adamw": _adamw, "adafactor": _adafactor}[config["optimizer"]]
    if (config["boundary"], config["names"]) != ("zero", case.names):
        raise ValueError(f"Another boundary, or other parameters: {case.names}")
    finals = functools.partial(_finals, case)
    return Replay(make(case), _TAME if tame else _ROUGH, finals, within_share(1e-5))


def _bracket(case: Case) -> dict[str, Any]:
    config = case.config
    transformed = set(config["wavelet_names"])
    chosen: dict[str, Any] = {
        "select": lambda path, leaf: path in transformed,
        # torch's weights are (out, in).
        "weight_dimension_numbers": lro.MatrixDimensionNumbers(1, 0),
    }
    if not config["wavelet_enabled"]:
        chosen = {"min_size": 1 << 30}  # a choice of nothing would be refused
    return {
        **chosen,
        "level": config["level"],
        "wavelet": config["wavelet"],
        "axis": config["axis"],
        "scale": config["scale"],
        "weight_decay": config["weight_decay"] or None,
    }


def _adamw(case: Case) -> optax.GradientTransformation:
    config = case.config
    (b1, b2), eps = config["betas"], config["eps"]
    base = None if config["correct_bias"] else lro.scale_by_raw_adam(b1, b2, eps)
    for unused in ("beta1", "clip_threshold", "decay_rate"):
        config.get(unused)
    return lro.gwt(
        config["lr"],
        b1=b1,
        b2=b2,
        eps=eps,
        growth_limit=config["gamma_limiter"],
        base_optimizer=base,
        conventions="authors",
        **_bracket(case),
    )


def _adafactor(case: Case) -> optax.GradientTransformation:
    config = case.config
    eps, _ = config["eps"]
    inner = [
        lro.scale_by_matrix_factored_rms(-config["decay_rate"], eps),
        lro.clip_by_matrix_rms(config["clip_threshold"]),
    ]
    if config["beta1"] is not None:
        inner.append(optax.ema(config["beta1"], debias=False))
    for unused in ("betas", "correct_bias", "gamma_limiter"):
        config.get(unused)
    return lro.gwt(
        config["lr"],
        base_optimizer=optax.chain(*inner),
        growth_limit=None,
        normalize=False,
        **_bracket(case),
    )


def _finals(case: Case, state: Any) -> dict[str, jax.Array]:
    """The moments, which were recorded in the order of the weights (out, bands)."""
    fields = {"exp_avg": "mu", "exp_avg_sq": "nu"}
    if case.config["optimizer"] == "adafactor":
        fields = {"exp_avg_sq_row": "col", "exp_avg_sq_col": "row"}
        if case.config["beta1"] is not None:
            fields["exp_avg"] = "ema"
    finals = {}
    for recorded, field in fields.items():
        tree: Any = optax.tree_utils.tree_get(state, field)
        for name in case.names:
            if f"final_{recorded}_{name}" in case.arrays:
                x = tree[name]
                turned = name in case.config["wavelet_names"] and x.ndim == 2
                finals[f"{recorded}_{name}"] = x.T if turned else x
    return finals
