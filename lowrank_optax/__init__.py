"""Memory-efficient training for JAX: low-rank optimizers as Optax transformations."""

import importlib as _importlib
import types as _types

# Methods: learning rate and decay included; ``scale_by_`` forms are directions alone.
from lowrank_optax.methods import *

# The bracket.
from lowrank_optax.bracket.chain import backproject as backproject
from lowrank_optax.bracket.chain import behind as behind
from lowrank_optax.bracket.chain import chain as chain
from lowrank_optax.bracket.chain import project as project
from lowrank_optax.bracket.energy import captured_energy as captured_energy
from lowrank_optax.bracket.resize import resize_state as resize_state
from lowrank_optax.bracket.selection import ConcludedAxesWarning as ConcludedAxesWarning
from lowrank_optax.bracket.selection import NotProjectedWarning as NotProjectedWarning
from lowrank_optax.bracket.selection import Selection as Selection
from lowrank_optax.bracket.selection import SelectionWarning as SelectionWarning
from lowrank_optax.bracket.selection import dimension_numbers as dimension_numbers
from lowrank_optax.bracket.state import SubspaceState as SubspaceState
from lowrank_optax.bracket.state import SubspaceView as SubspaceView
from lowrank_optax.bracket.subspace import subspace as subspace

# Leaves: matrices in parameters, moments in states.
from lowrank_optax.leaves.matrix import Axes as Axes
from lowrank_optax.leaves.matrix import Matrix as Matrix
from lowrank_optax.leaves.matrix import MatrixDimensionNumbers as MatrixDimensionNumbers
from lowrank_optax.leaves.moments import register_moments as register_moments

# Projectors.
from lowrank_optax.projectors import At as At
from lowrank_optax.projectors import BasisProjector as BasisProjector
from lowrank_optax.projectors import OrthonormalProjector as OrthonormalProjector
from lowrank_optax.projectors import Projector as Projector
from lowrank_optax.projectors import correlation as correlation
from lowrank_optax.projectors import dct as dct
from lowrank_optax.projectors import gaussian as gaussian
from lowrank_optax.projectors import given as given
from lowrank_optax.projectors import grassmann as grassmann
from lowrank_optax.projectors import lazy as lazy
from lowrank_optax.projectors import online_pca as online_pca
from lowrank_optax.projectors import power as power
from lowrank_optax.projectors import power_iteration as power_iteration
from lowrank_optax.projectors import quantize_basis as quantize_basis
from lowrank_optax.projectors import sampled_svd as sampled_svd
from lowrank_optax.projectors import svd as svd
from lowrank_optax.projectors import switched as switched
from lowrank_optax.projectors import watched as watched
from lowrank_optax.projectors import wavelet as wavelet
from lowrank_optax.projectors import whole as whole

# Transport of moments.
from lowrank_optax.transport import Transport as Transport
from lowrank_optax.transport import align_signs as align_signs
from lowrank_optax.transport import gather_moments as gather_moments
from lowrank_optax.transport import keep_moments as keep_moments
from lowrank_optax.transport import rotate_moments as rotate_moments

# Linear algebra: what projectors and transports are given.
from lowrank_optax.linalg.bases import Rotation as Rotation
from lowrank_optax.linalg.products import Operand as Operand

# Recovery.
from lowrank_optax.recovery import LeafView as LeafView
from lowrank_optax.recovery import Recovered as Recovered
from lowrank_optax.recovery import Recovery as Recovery
from lowrank_optax.recovery import complement as complement
from lowrank_optax.recovery import error_feedback as error_feedback
from lowrank_optax.recovery import recover_scale as recover_scale
from lowrank_optax.recovery import wavelet_details as wavelet_details

# Transforms: plain Optax transformations.
from lowrank_optax.transforms import cast_moments as cast_moments
from lowrank_optax.transforms import clip_by_matrix_rms as clip_by_matrix_rms
from lowrank_optax.transforms import decay_after as decay_after
from lowrank_optax.transforms import decay_before as decay_before
from lowrank_optax.transforms import momentum as momentum
from lowrank_optax.transforms import (
    normalize_rows_and_columns as normalize_rows_and_columns,
)
from lowrank_optax.transforms import orthogonalize as orthogonalize
from lowrank_optax.transforms import normalize_outputs as normalize_outputs
from lowrank_optax.transforms import power_momentum as power_momentum
from lowrank_optax.transforms import row_momentum as row_momentum
from lowrank_optax.transforms import quantize_state as quantize_state
from lowrank_optax.transforms import scale_by_adam_mini as scale_by_adam_mini
from lowrank_optax.transforms import (
    scale_by_bias_correction as scale_by_bias_correction,
)
from lowrank_optax.transforms import scale_by_folded_adam as scale_by_folded_adam
from lowrank_optax.transforms import (
    scale_by_lion_interpolation as scale_by_lion_interpolation,
)
from lowrank_optax.transforms import (
    scale_by_matrix_factored_rms as scale_by_matrix_factored_rms,
)
from lowrank_optax.transforms import (
    scale_by_natural_gradient as scale_by_natural_gradient,
)
from lowrank_optax.transforms import scale_by_parameter_rms as scale_by_parameter_rms
from lowrank_optax.transforms import scale_by_rank_one_rms as scale_by_rank_one_rms
from lowrank_optax.transforms import scale_by_raw_adam as scale_by_raw_adam
from lowrank_optax.transforms import SplitWeightsState as SplitWeightsState
from lowrank_optax.transforms import full_weights as full_weights
from lowrank_optax.transforms import set_full_weights as set_full_weights
from lowrank_optax.transforms import split_weights as split_weights
from lowrank_optax.transforms import (
    scale_by_regressed_adam as scale_by_regressed_adam,
)
from lowrank_optax.transforms import stabilize_gradients as stabilize_gradients

# Weights in few bits.
from lowrank_optax.weights import WeightStorage as WeightStorage
from lowrank_optax.weights import dequantize_weights as dequantize_weights
from lowrank_optax.weights import quantize_weights as quantize_weights
from lowrank_optax.weights import rounding_key as rounding_key
from lowrank_optax.weights import (
    stochastic_round_apply_updates as stochastic_round_apply_updates,
)
from lowrank_optax.weights import weight_shardings as weight_shardings
from lowrank_optax.weights import weight_storage as weight_storage

# Without a backward pass: gradient estimates from losses alone.
from lowrank_optax.zeroth_order import Directions as Directions
from lowrank_optax.zeroth_order import Perturbed as Perturbed
from lowrank_optax.zeroth_order import ZerothOrder as ZerothOrder
from lowrank_optax.zeroth_order import ZerothOrderState as ZerothOrderState
from lowrank_optax.zeroth_order import lozo as lozo
from lowrank_optax.zeroth_order import materialize as materialize
from lowrank_optax.zeroth_order import mezo as mezo
from lowrank_optax.zeroth_order import subzero as subzero
from lowrank_optax.zeroth_order import tezo as tezo
from lowrank_optax.zeroth_order import zeroth_order as zeroth_order

# Shapes: what can be said of an optimizer before it runs.
from lowrank_optax.shapes.collectives import Collective as Collective
from lowrank_optax.shapes.collectives import collectives as collectives
from lowrank_optax.shapes.memory import StateBytes as StateBytes
from lowrank_optax.shapes.memory import bytes_per_device as bytes_per_device
from lowrank_optax.shapes.memory import state_bytes as state_bytes
from lowrank_optax.shapes.ranks import EnergyRanks as EnergyRanks
from lowrank_optax.shapes.ranks import rank_by_energy as rank_by_energy
from lowrank_optax.shapes.report import SelectionReport as SelectionReport
from lowrank_optax.shapes.report import selection_report as selection_report
from lowrank_optax.shapes.sharding import state_shardings as state_shardings
from lowrank_optax.shapes.topology import Topology as Topology
from lowrank_optax.shapes.topology import abstract_mesh as abstract_mesh
from lowrank_optax.shapes.topology import parse_topology as parse_topology
from lowrank_optax.shapes.topology import topology_devices as topology_devices

# Modules; ``lro.testing`` is imported when it is asked for, as it needs an extra.
from lowrank_optax import activations as activations
from lowrank_optax import distributed as distributed
from lowrank_optax import layerwise as layerwise
from lowrank_optax import quantization as quantization

_MODULES = {"activations", "distributed", "layerwise", "quantization", "testing"}


def __getattr__(name: str) -> _types.ModuleType:
    if name == "testing":
        return _importlib.import_module("lowrank_optax.testing")
    raise AttributeError(f"module 'lowrank_optax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone: importing leaves inner modules among the globals."""
    names = {
        name
        for name, value in globals().items()
        if not name.startswith("_") and not isinstance(value, _types.ModuleType)
    }
    return sorted(names | _MODULES)
