"""What a change of basis does to the moments that live in it."""

from lowrank_optax.transport._protocol import Transport as Transport
from lowrank_optax.transport.gather import gather_moments as gather_moments
from lowrank_optax.transport.keep import align_signs as align_signs
from lowrank_optax.transport.keep import keep_moments as keep_moments
from lowrank_optax.transport.rotate import rotate_moments as rotate_moments
