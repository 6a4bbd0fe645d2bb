"""SubTrack++'s and LDAdam's cases: nothing injected, from the first SVD on."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from lowrank_optax.linalg.bases import leading_singular_vectors
from tests.golden.cases import Case
from tests.golden.replay import Measure, Replay, within_share, within_travel

# What a config says of its recording alone.
_REMARKS = (
    "grad_seed",
    "param_seed",
    "randomness_drawn",
    "relerr_vs_float64_reference",
    "tangent_sigma1_sigma2",
    "tangent_sigma1_sigma2_wide",
)

# LDAdam's released code ran in float32; its distance from a float64 replay of the
# same case, 1e-5 at most, is the scale of what rounding does.
_ROUNDING = 1e-4

# SubTrack++'s paper cases were computed in float64, and so are the replays. All but one
# column of one matrix then agree to 1e-7, the recording's rounding. Transport at every
# step in the formula's printed form is what magnifies the rest: in float32, a change
# of 6e-8 in the gradients moves the end of that case by 7e-3 of the travel.
_REFERENCE = 1e-4


def subtrackpp(case: Case, x64: bool = True) -> Replay:
    """SubTrack++: the paper's rules, or the released code where it tracks."""
    config = _config(case)
    official = config["variant"] == "official"
    if config["eta_schedule"] != "constant":
        raise ValueError("Only a constant eta was recorded.")
    if not official and config["residual"] != "G - S S^T G (unscaled)":
        raise ValueError("The paper's residual is the unscaled one.")
    if official:
        # Ten times what its own rounding did to the released code, by its distance
        # from a float64 replay.
        share = max(10 * config["relerr_vs_float64_reference"]["wide"], 1e-5)
        return Replay(_released(case), *_judges(case, share))
    dtype = jnp.float64 if x64 else jnp.float32
    return Replay(
        _from_the_paper(case, dtype), *_judges(case, _REFERENCE), dtype, dtype, x64
    )


def _from_the_paper(case: Case, dtype: Any) -> optax.GradientTransformation:
    config = case.config
    form = config.get("projection_aware_form", "off")
    if (form == "off") == config["projection_aware"]:
        raise ValueError("The config says two things about transport.")
    # Without transport nothing is done at all: signs are not aligned either.
    transport = lro.keep_moments()
    if config["projection_aware"]:
        transport = lro.rotate_moments(config["b1"], config["b2"], form)
    wide = {"basis_dtype": dtype, "dtype": dtype}
    if config["recovery"]:
        return _method(case, transport, "paper", **wide)
    return _in_parts(case, transport, **wide)


def _released(case: Case) -> optax.GradientTransformation:
    config, transport = case.config, lro.keep_moments()
    if config["projection_aware"]:
        shapes = {name: b.shape[1:] for name, b in _bases(case).items()}
        return _in_parts(case, transport, released_transport(shapes))
    if config["recovery"]:
        return _method(case, transport, "authors")
    return _in_parts(case, transport)


def _method(case: Case, transport, residual, **options):
    """The method itself, in the authors' conventions."""
    config = case.config
    return lro.subtrack(
        config["lr"],
        config["rank"],
        update_proj_gap=config["interval"],
        step=config["eta"],
        scale=config["scale"],
        b1=config["b1"],
        b2=config["b2"],
        eps=config["eps"],
        weight_decay=config["weight_decay"] or None,
        transport=transport,
        recovery=_recovery(config, residual),
        conventions="authors",
        **_options(case),
        **options,
    )


def _in_parts(case: Case, transport, wrap=None, *, basis_dtype=jnp.float32, **options):
    """What no method offers: no recovery, or the released transport."""
    config = case.config
    recovery = _recovery(config, "authors")
    b1, b2, rate = config["b1"], config["b2"], config["lr"]
    gap, decay = config["interval"], config["weight_decay"]
    inner = lro.scale_by_raw_adam(b1, b2, config["eps"])
    projector = lro.grassmann(
        config["rank"], gap, basis_dtype, step=config["eta"], cold_start="svd"
    )
    parts = [
        lro.project(projector, transport=transport, **_options(case), **options),
        inner if wrap is None else wrap(inner, b2, gap),
        *([recovery] if config["recovery"] else []),
        lro.backproject(config["scale"]),
    ]
    return optax.chain(
        lro.chain(*parts),
        lro.scale_by_bias_correction(b1, b2),
        optax.scale_by_learning_rate(rate),
        lro.decay_after(rate, decay) if decay else optax.identity(),
    )


def _recovery(config, residual: str) -> lro.Recovery:
    limit = config["zeta"]
    return lro.recover_scale(
        growth_limit=limit if config["limiter"] else None, residual=residual
    )


class ReleasedTransportState(NamedTuple):
    """The first bases, and Adam's state."""

    first: dict[str, jax.Array]
    adam: optax.ScaleByAdamState


def released_transport(shapes: dict[str, tuple[int, ...]]):
    """The released code's transport, a mistake: kept here to replay what it did.

    After every gap-th update the moments are turned by ``C = S^T S_first``: from the
    first basis instead of the previous one, a step before the basis moves, and with
    the second moment multiplied by ``1 - b2``.
    """

    def wrap(adam: optax.GradientTransformation, b2: float, gap: int):
        def init(params):
            first = {name: jnp.zeros(shape) for name, shape in shapes.items()}
            return ReleasedTransportState(first, adam.init(params))

        def update(updates, state, params=None, *, subspace):
            directions, adam_state = adam.update(updates, state.adam, params)
            mu, nu, first = dict(adam_state.mu), dict(adam_state.nu), dict(state.first)
            started, now = adam_state.count == 1, adam_state.count % gap == 0
            for name in shapes:
                basis = subspace.basis[name]
                first[name] = jnp.where(started, basis, first[name])
                turn = basis.T @ first[name]
                turned = turn @ mu[name]
                spread = turn**2 @ (nu[name] - mu[name] ** 2) + turned**2
                mu[name] = jnp.where(now, turned, mu[name])
                nu[name] = jnp.where(now, (1 - b2) * jnp.abs(spread), nu[name])
            adam_state = adam_state._replace(mu=mu, nu=nu)
            return directions, ReleasedTransportState(first, adam_state)

        return optax.GradientTransformationExtraArgs(init, update)

    return wrap


class svd_of_momentum(lro.power_iteration):
    """LDAdam's other projector: the SVD of the same mixture, formed."""

    def follow(self, matrix, gradient, old, at):
        momentum = self._momentum(at, jnp.ones([]))
        assert momentum is not None
        mixture = old @ momentum + (1.0 - self.rho) * gradient.array
        return leading_singular_vectors(mixture, matrix.rank)


def ldadam(case: Case) -> Replay:
    """LDAdam as released."""
    config = _config(case)
    if config["variant"] != "official":
        raise ValueError("Only the released code was recorded.")
    forms = {"power_iteration": lro.power_iteration, "svd": svd_of_momentum}
    b1, rho = config["b1"], config["rho"]
    projector = forms[config["proj_method"]](config["rank"], b1, rho, cold_start="svd")
    how = {"projector": projector}
    if config["proj_method"] == "power_iteration":
        how = {"rank": config["rank"], "rho": rho}
    tx = lro.ldadam(
        config["lr"],
        error_feedback=config["error_feedback"],
        b1=b1,
        b2=config["b2"],
        eps=config["eps"],
        weight_decay=config["weight_decay"] or None,
        conventions="authors",
        **how,
        **_options(case),
    )
    return Replay(tx, *_judges(case, _ROUNDING))


def _config(case: Case):
    for key in _REMARKS:
        case.config.get(key)
    return case.config


def _options(case: Case) -> dict[str, Any]:
    """Which parameters are projected, and from the recorded sides."""
    sides = case.config["proj_side"]
    projected = set(_bases(case))
    for name in projected:
        rows, columns = case.params(name).shape[1:]
        if (sides[name] == "right") != (rows > columns):
            raise ValueError(f"{name} was not projected on its short side.")
    return {"select": lambda path, leaf: path in projected}


def _bases(case: Case) -> dict[str, Any]:
    """The recorded bases, standing upright."""
    bases = {}
    for name, side in case.config["proj_side"].items():
        if (basis := case.arrays.get(f"basis_{name}")) is not None:
            bases[name] = basis.swapaxes(-1, -2) if side == "right" else basis
    return bases


def _judges(case: Case, share: float) -> tuple[Measure, Any, Measure]:
    """Tolerances on parameters and moments, and the moments."""
    finals = functools.partial(_finals, case)
    return within_travel(share), finals, within_share(10 * share)


def _finals(case: Case, state: Any) -> dict[str, jax.Array]:
    """The moments; a basis vector's sign is arbitrary, and its momentum follows it."""
    finals = {}
    moments: Any = {f: optax.tree_utils.tree_get(state, f) for f in ("mu", "nu")}
    for name in _bases(case):
        right = case.config["proj_side"][name] == "right"
        recorded = case.arrays[f"final_m_{name}"]
        recorded = recorded.T if right else recorded
        mu, nu = moments["mu"][name], moments["nu"][name]
        mu = mu * jnp.sign(jnp.sum(mu * recorded, axis=1, keepdims=True))
        finals[f"m_{name}"], finals[f"v_{name}"] = (mu.T, nu.T) if right else (mu, nu)
    return finals
