"""Property tests for your own projectors and transformations (extra ``testing``).

Not imported by ``lowrank_optax`` itself: it needs chex and hypothesis.
"""

try:
    import chex as _chex
    import hypothesis as _hypothesis
except ImportError as error:
    raise ImportError(
        f"lowrank_optax.testing needs {error.name}, which is in the extra: "
        "pip install 'lowrank-optax[testing]'"
    ) from error
del _chex, _hypothesis

from lowrank_optax.testing._assertions import assert_bit_equal as assert_bit_equal
from lowrank_optax.testing._assertions import assert_in_span as assert_in_span
from lowrank_optax.testing._assertions import assert_orthonormal as assert_orthonormal
from lowrank_optax.testing._assertions import assert_state_stable as assert_state_stable
from lowrank_optax.testing._laws import LAWS as LAWS
from lowrank_optax.testing._laws import assert_laws as assert_laws
from lowrank_optax.testing._matrices import HARD_MATRICES as HARD_MATRICES
from lowrank_optax.testing._matrices import HARD_SHAPES as HARD_SHAPES
from lowrank_optax.testing._matrices import hard_matrices as hard_matrices
from lowrank_optax.testing._matrices import hard_matrix as hard_matrix
from lowrank_optax.testing._projectors import (
    assert_projector_laws as assert_projector_laws,
)
from lowrank_optax.testing._subject import Subject as Subject
