"""The optimizers that are timed side by side, each as one jitted update."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.quantization import companded

LEARNING_RATE = 1e-3
SELECT = r"(^|/)(q|k|v|o|gate|up|down)$"  # the layer matrices


class JaxPeer:
    """An Optax transformation, compiled ahead; its state is donated to each step."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        """Compiles the update for these parameters."""
        self.params = params
        self.state = jax.jit(tx.init)(params)
        self.state_bytes = lro.state_bytes(tx, params).total

        def update(state, gradients, params):
            return tx.update(gradients, state, params)

        step = jax.jit(update, donate_argnums=0)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, params, params).compile()
        self.compile_seconds = time.perf_counter() - start
        memory: Any = self.compiled.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes
        costs: Any = self.compiled.cost_analysis()
        self.accessed_bytes, self.flops = costs["bytes accessed"], costs["flops"]

        def train(state, gradients, params):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.weights = jax.tree.map(jnp.copy, params)
        step = jax.jit(train, donate_argnums=(0, 2))
        self.applied = step.lower(self.state, params, self.weights).compile()

    def apply(self, gradients: Any) -> float:
        """Moves the weights by one update, as a train step does; returns seconds."""
        start = time.perf_counter()
        self.weights, self.state = self.applied(self.state, gradients, self.weights)
        jax.block_until_ready((self.weights, self.state))
        return time.perf_counter() - start

    def step(self, gradients: Any) -> float:
        """Runs one update and returns its seconds."""
        start = time.perf_counter()
        updates, self.state = self.compiled(self.state, gradients, self.params)
        jax.block_until_ready((updates, self.state))
        return time.perf_counter() - start

    def make_due(self, gap: int) -> None:
        """Turns the counter so that the next step is a refresh."""

        def turn(path, leaf):
            return leaf.at[...].set(gap) if is_count(path) else leaf

        def is_count(path):
            return getattr(path[-1], "name", "") == "count" and len(path) <= 2

        self.state = jax.tree_util.tree_map_with_path(turn, self.state)


class TorchPeer:
    """The authors' GaLoreAdamW (package galore-torch), parameters moved in place."""

    def __init__(self, params: Any, rank: int, gap: int):
        """Builds the optimizer; raises ImportError where it is not installed."""
        import torch  # pyright: ignore[reportMissingImports]
        from galore_torch import (  # pyright: ignore[reportMissingImports]
            GaLoreAdamW,
        )

        torch.set_num_threads(2)
        # torch weights are (out, in), Flax kernels (in, out).
        self.torch = torch
        self.params = [
            torch.nn.Parameter(torch.tensor(np.array(leaf.T)))
            for leaf in jax.tree.leaves(params)
        ]
        group = {
            "params": self.params,
            "rank": rank,
            "update_proj_gap": gap,
            "scale": 0.25,
            "proj_type": "std",
        }
        self.optimizer = GaLoreAdamW(
            [group], lr=LEARNING_RATE, no_deprecation_warning=True
        )
        self.compile_seconds, self.temp_bytes = 0.0, None

    def step(self, gradients: Any) -> float:
        """Runs one update and returns its seconds."""
        leaves = jax.tree.leaves(gradients)
        for param, leaf in zip(self.params, leaves, strict=True):
            param.grad = self.torch.from_numpy(np.array(leaf.T))
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def make_due(self, gap: int) -> None:
        """Turns the counters so that the next step is a refresh."""
        for param in self.params:
            self.optimizer.state[param]["step"] = gap

    @property
    def state_bytes(self) -> int:
        """Bytes of moments and bases after the first step."""
        tensors = []
        for state in self.optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
            tensors.append(state["projector"].ortho_matrix)
        return sum(x.numel() * x.element_size() for x in tensors)


def peers(rank: int, gap: int, with_torch: bool) -> dict[str, Callable[[Any], Any]]:
    """Returns name -> builder, adamw first."""

    def low_rank(method: Any, **options: Any) -> Callable[[Any], Any]:
        if "projector" not in options:  # which has a rank of its own
            options = {"rank": rank, **options}
        options = {"layer_axis": 0, "select": SELECT, **options}
        return lambda params: JaxPeer(method(LEARNING_RATE, **options), params)

    def galore(form: Any, **options: Any) -> Callable[[Any], Any]:
        return low_rank(lro.galore, projector=form(rank, gap), **options)

    contrib = optax.contrib.galore(LEARNING_RATE, rank, gap, 0.25)

    def whole(method: Any, **options: Any) -> Callable[[Any], Any]:
        options = {"layer_axis": 0, "select": SELECT, **options}
        return lambda params: JaxPeer(method(LEARNING_RATE, **options), params)

    def muon(params: Any) -> Any:
        def numbers(params: Any) -> Any:
            first = jax.tree.leaves(params)[0].ndim - 2
            axes = optax.contrib.MuonDimensionNumbers(first, first + 1)
            return jax.tree.map(lambda _: axes, params)

        tx = optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=numbers)
        return JaxPeer(tx, params)

    named: dict[str, Callable[[Any], Any]] = {
        "optax.adamw": lambda params: JaxPeer(optax.adamw(LEARNING_RATE), params),
        "optax.contrib.galore": lambda params: JaxPeer(contrib, params),
        "lro.galore svd": galore(lro.svd),
        "lro.galore power": galore(lro.power),
        "lro.fira": low_rank(lro.fira, update_proj_gap=gap),
        "lro.subtrack": low_rank(lro.subtrack, update_proj_gap=gap),
        "lro.ldadam": low_rank(lro.ldadam),
        "lro.ldadam feedback": low_rank(lro.ldadam, error_feedback=True),
        "lro.online_subspace_descent": low_rank(lro.online_subspace_descent),
        "lro.apollo": low_rank(lro.apollo, update_proj_gap=gap),
        "lro.apollo_mini": low_rank(lro.apollo_mini, rank=1, update_proj_gap=gap),
        "lro.coap": low_rank(lro.coap, update_proj_gap=gap),
        "lro.sara": low_rank(lro.sara, update_proj_gap=gap),
        "lro.dct_adamw": low_rank(lro.dct_adamw, update_proj_gap=gap),
        "lro.natural_galore": low_rank(lro.natural_galore, update_proj_gap=gap),
        "lro.galore_plus": low_rank(lro.galore_plus, heads=8, update_proj_gap=gap),
        "lro.frugal": low_rank(lro.frugal, update_proj_gap=gap),
        "lro.sumo": low_rank(lro.sumo, update_proj_gap=gap),
        "lro.adamw_8bit": lambda params: JaxPeer(lro.adamw_8bit(LEARNING_RATE), params),
        "companded Adam": lambda params: JaxPeer(_companded(), params),
        "lro.galore_8bit": low_rank(lro.galore_8bit, update_proj_gap=gap),
        "lro.q_galore": low_rank(lro.q_galore, update_proj_gap=gap),
        "lro.gwt": whole(lro.gwt),
        "lro.gwt unbounded": whole(lro.gwt, detail_clip=jnp.inf),
        "lro.gwt db2": whole(lro.gwt, wavelet="db2"),
        "optax.contrib.muon": muon,
        "lro.muon": whole(lro.muon),
        "lro.even_muon": whole(lro.even_muon),
        "lro.even_muon 4 bits": whole(lro.even_muon, bits=4),
        # No inner optimizer at all: what the two products cost, a floor for the rest.
        "lro products alone": galore(lro.power, base_optimizer=optax.identity()),
    }
    if with_torch:
        named["galore-torch"] = lambda params: TorchPeer(params, rank, gap)
    return named


def _companded() -> Any:
    codecs = companded(64), companded(64, signed=False)
    adam = lro.quantize_state(optax.scale_by_adam(), *codecs, leafwise=True)
    return optax.chain(adam, optax.scale_by_learning_rate(LEARNING_RATE))


def measure(peers: dict[str, Any], gradients: Any, gap: int, steps: int, due: int):
    """Times plain and refresh steps, the peers taking turns; returns medians.

    The first step (compiled, but with cold bases) is reported apart.
    """
    cold = {name: peer.step(gradients) for name, peer in peers.items()}
    applied: dict[str, list[float]] = {name: [] for name in peers}
    plain: dict[str, list[float]] = {name: [] for name in peers}
    fresh: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(steps):
        for name, peer in peers.items():
            plain[name].append(peer.step(gradients))
            if isinstance(peer, JaxPeer):
                applied[name].append(peer.apply(gradients))
    for _ in range(due):
        for name, peer in peers.items():
            if name != "optax.adamw":
                peer.make_due(gap)
                fresh[name].append(peer.step(gradients))
    rows = []
    for name, peer in peers.items():
        step = statistics.median(plain[name])
        refresh = statistics.median(fresh[name]) if fresh[name] else step
        rows.append(
            {
                "optimizer": name,
                "state_bytes": peer.state_bytes,
                "compile_s": peer.compile_seconds,
                "cold_ms": 1e3 * cold[name],
                "plain_ms": 1e3 * step,
                "refresh_ms": 1e3 * refresh,
                "applied_ms": _milliseconds(applied[name]),
                "mean_ms": 1e3 * ((gap - 1) * step + refresh) / gap,
                "temp_bytes": peer.temp_bytes,
                # The compiler's counts, of the update alone.
                "accessed_bytes": getattr(peer, "accessed_bytes", None),
                "flops": getattr(peer, "flops", None),
            }
        )
    return rows


def _milliseconds(seconds: list[float]) -> float | None:
    return 1e3 * statistics.median(seconds) if seconds else None


def random_like(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Returns Gaussian arrays of these shapes."""
    key = jax.random.key(seed)
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
