"""Memory-efficient training for JAX: low-rank optimizers as Optax transformations."""

# The bracket.
from lowrank_optax.bracket.chain import backproject as backproject
from lowrank_optax.bracket.chain import chain as chain
from lowrank_optax.bracket.chain import project as project

# Helpers.
from lowrank_optax.methods._hyperparams import static_args as static_args
from lowrank_optax.leaves.matrix import Matrix as Matrix
from lowrank_optax.leaves.matrix import MatrixDimensionNumbers as MatrixDimensionNumbers
from lowrank_optax.leaves.moments import register_moments as register_moments
from lowrank_optax.shapes.collectives import Collective as Collective
from lowrank_optax.shapes.collectives import collectives as collectives
from lowrank_optax.shapes.memory import bytes_per_device as bytes_per_device
from lowrank_optax.shapes.report import SelectionReport as SelectionReport
from lowrank_optax.shapes.report import selection_report as selection_report
from lowrank_optax.shapes.topology import Topology as Topology
from lowrank_optax.shapes.topology import abstract_mesh as abstract_mesh
from lowrank_optax.shapes.topology import parse_topology as parse_topology
from lowrank_optax.shapes.topology import topology_devices as topology_devices
from lowrank_optax.bracket.state import SubspaceState as SubspaceState
from lowrank_optax.bracket.state import SubspaceView as SubspaceView
from lowrank_optax.bracket.selection import Selection as Selection
from lowrank_optax.bracket.subspace import subspace as subspace

# Transport of moments.
from lowrank_optax.linalg.bases import Rotation as Rotation
from lowrank_optax.shapes.sharding import state_shardings as state_shardings
from lowrank_optax.shapes.memory import StateBytes as StateBytes
from lowrank_optax.shapes.memory import state_bytes as state_bytes
from lowrank_optax.weights import WeightStorage as WeightStorage
from lowrank_optax.weights import dequantize_weights as dequantize_weights
from lowrank_optax.weights import quantize_weights as quantize_weights
from lowrank_optax.weights import (
    stochastic_round_apply_updates as stochastic_round_apply_updates,
)
from lowrank_optax.weights import rounding_key as rounding_key
from lowrank_optax.weights import weight_shardings as weight_shardings
from lowrank_optax.weights import weight_storage as weight_storage

# Activation memory.
from lowrank_optax import activations as activations

# Communication and accumulation.
from lowrank_optax import distributed as distributed

# Updates inside the backward pass.
from lowrank_optax import layerwise as layerwise

# Methods.
from lowrank_optax.methods.adamw_8bit import adamw_8bit as adamw_8bit
from lowrank_optax.methods.apollo import apollo as apollo
from lowrank_optax.methods.apollo import scale_by_apollo as scale_by_apollo
from lowrank_optax.methods.apollo_mini import apollo_mini as apollo_mini
from lowrank_optax.methods.apollo_mini import (
    scale_by_apollo_mini as scale_by_apollo_mini,
)
from lowrank_optax.methods.dct_adamw import dct_adamw as dct_adamw
from lowrank_optax.methods.dct_adamw import scale_by_dct_adamw as scale_by_dct_adamw
from lowrank_optax.methods.coap import coap as coap
from lowrank_optax.methods.coap import scale_by_coap as scale_by_coap
from lowrank_optax.methods.fira import fira as fira
from lowrank_optax.methods.fira import scale_by_fira as scale_by_fira
from lowrank_optax.methods.frugal import frugal as frugal
from lowrank_optax.methods.frugal import scale_by_frugal as scale_by_frugal
from lowrank_optax.methods.galore import galore as galore
from lowrank_optax.methods.galore import scale_by_galore as scale_by_galore
from lowrank_optax.methods.galore_8bit import galore_8bit as galore_8bit
from lowrank_optax.methods.galore_8bit import (
    scale_by_galore_8bit as scale_by_galore_8bit,
)
from lowrank_optax.methods.galore_adafactor import galore_adafactor as galore_adafactor
from lowrank_optax.methods.galore_plus import galore_plus as galore_plus
from lowrank_optax.methods.galore_plus import (
    scale_by_galore_plus as scale_by_galore_plus,
)
from lowrank_optax.methods.grass_jump import grass_jump as grass_jump
from lowrank_optax.methods.grass_jump import scale_by_grass_jump as scale_by_grass_jump
from lowrank_optax.methods.grass_walk import grass_walk as grass_walk
from lowrank_optax.methods.grass_walk import scale_by_grass_walk as scale_by_grass_walk
from lowrank_optax.methods.gwt import gwt as gwt
from lowrank_optax.methods.gwt import scale_by_gwt as scale_by_gwt
from lowrank_optax.methods.ldadam import ldadam as ldadam
from lowrank_optax.methods.ldadam import scale_by_ldadam as scale_by_ldadam
from lowrank_optax.methods.natural_galore import natural_galore as natural_galore
from lowrank_optax.methods.natural_galore import (
    scale_by_natural_galore as scale_by_natural_galore,
)
from lowrank_optax.methods.online_subspace_descent import (
    online_subspace_descent as online_subspace_descent,
)
from lowrank_optax.methods.online_subspace_descent import (
    scale_by_online_subspace_descent as scale_by_online_subspace_descent,
)
from lowrank_optax.methods.q_galore import q_galore as q_galore
from lowrank_optax.methods.q_galore import scale_by_q_galore as scale_by_q_galore
from lowrank_optax.methods.sara import sara as sara
from lowrank_optax.methods.sara import scale_by_sara as scale_by_sara
from lowrank_optax.methods.subtrack import scale_by_subtrack as scale_by_subtrack
from lowrank_optax.methods.subtrack import subtrack as subtrack
from lowrank_optax.methods.sumo import scale_by_sumo as scale_by_sumo
from lowrank_optax.methods.sumo import sumo as sumo

# Projectors.
from lowrank_optax.projectors import At as At
from lowrank_optax.projectors import BasisProjector as BasisProjector
from lowrank_optax.projectors import OrthonormalProjector as OrthonormalProjector
from lowrank_optax.projectors import Projector as Projector
from lowrank_optax.projectors import dct as dct
from lowrank_optax.projectors import correlation as correlation
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
from lowrank_optax.projectors import wavelet as wavelet

# Recovery.
from lowrank_optax.recovery import LeafView as LeafView
from lowrank_optax.recovery import Recovered as Recovered
from lowrank_optax.recovery import Recovery as Recovery
from lowrank_optax.recovery import complement as complement
from lowrank_optax.recovery import error_feedback as error_feedback
from lowrank_optax.recovery import recover_scale as recover_scale
from lowrank_optax.recovery import wavelet_details as wavelet_details

# Plain transformations.
from lowrank_optax.transforms import cast_moments as cast_moments
from lowrank_optax.transforms import clip_by_matrix_rms as clip_by_matrix_rms
from lowrank_optax.transforms import decay_after as decay_after
from lowrank_optax.transforms import decay_before as decay_before
from lowrank_optax.transforms import orthogonalize as orthogonalize
from lowrank_optax.transforms import quantize_state as quantize_state
from lowrank_optax.transforms import scale_by_adam_mini as scale_by_adam_mini
from lowrank_optax.transforms import (
    scale_by_bias_correction as scale_by_bias_correction,
)
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
from lowrank_optax.transforms import scale_by_raw_adam as scale_by_raw_adam
from lowrank_optax.transport import Transport as Transport
from lowrank_optax.transport import align_signs as align_signs
from lowrank_optax.transport import gather_moments as gather_moments
from lowrank_optax.transport import keep_moments as keep_moments
from lowrank_optax.transport import rotate_moments as rotate_moments
