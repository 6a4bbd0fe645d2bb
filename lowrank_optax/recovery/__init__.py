"""What happens to the part of the gradient outside the subspace."""

from lowrank_optax.recovery._protocol import LeafView as LeafView
from lowrank_optax.recovery._protocol import Recovered as Recovered
from lowrank_optax.recovery._protocol import Recovery as Recovery
from lowrank_optax.recovery.complement import complement as complement
from lowrank_optax.recovery.feedback import error_feedback as error_feedback
from lowrank_optax.recovery.scale import recover_scale as recover_scale
from lowrank_optax.recovery.wavelet import wavelet_details as wavelet_details
