"""Plain Optax transformations that the methods are composed of."""

from lowrank_optax.transforms.authors import (
    scale_by_bias_correction as scale_by_bias_correction,
)
from lowrank_optax.transforms.authors import scale_by_raw_adam as scale_by_raw_adam
from lowrank_optax.transforms.cast import cast_moments as cast_moments
from lowrank_optax.transforms.decay import decay_after as decay_after
from lowrank_optax.transforms.decay import decay_before as decay_before
from lowrank_optax.transforms.factored import clip_by_matrix_rms as clip_by_matrix_rms
from lowrank_optax.transforms.factored import (
    scale_by_matrix_factored_rms as scale_by_matrix_factored_rms,
)
from lowrank_optax.transforms.factored import (
    scale_by_parameter_rms as scale_by_parameter_rms,
)
from lowrank_optax.transforms.folded import scale_by_folded_adam as scale_by_folded_adam
from lowrank_optax.transforms.lion import (
    scale_by_lion_interpolation as scale_by_lion_interpolation,
)
from lowrank_optax.transforms.mini import scale_by_adam_mini as scale_by_adam_mini
from lowrank_optax.transforms.momentum import momentum as momentum
from lowrank_optax.transforms.momentum import row_momentum as row_momentum
from lowrank_optax.transforms.natural import (
    scale_by_natural_gradient as scale_by_natural_gradient,
)
from lowrank_optax.transforms.orthogonalize import orthogonalize as orthogonalize
from lowrank_optax.transforms.outputs import normalize_outputs as normalize_outputs
from lowrank_optax.transforms.power_momentum import power_momentum as power_momentum
from lowrank_optax.transforms.quantized import quantize_state as quantize_state
from lowrank_optax.transforms.rank_one import (
    scale_by_rank_one_rms as scale_by_rank_one_rms,
)
from lowrank_optax.transforms.regressed import (
    scale_by_regressed_adam as scale_by_regressed_adam,
)
from lowrank_optax.transforms.sinkhorn import (
    normalize_rows_and_columns as normalize_rows_and_columns,
)
from lowrank_optax.transforms.split import SplitWeightsState as SplitWeightsState
from lowrank_optax.transforms.split import full_weights as full_weights
from lowrank_optax.transforms.split import set_full_weights as set_full_weights
from lowrank_optax.transforms.split import split_weights as split_weights
from lowrank_optax.transforms.stable import stabilize_gradients as stabilize_gradients
