"""From a gradient to a basis: one family per file, one interface for all."""

from lowrank_optax.projectors._protocol import At as At
from lowrank_optax.projectors._protocol import BasisProjector as BasisProjector
from lowrank_optax.projectors._protocol import (
    OrthonormalProjector as OrthonormalProjector,
)
from lowrank_optax.projectors._protocol import Projector as Projector
from lowrank_optax.projectors._protocol import check_complete as check_complete
from lowrank_optax.projectors._two_sided import TwoSidedBasis as TwoSidedBasis
from lowrank_optax.projectors._two_sided import two_sided as two_sided
from lowrank_optax.projectors.correlation import correlation as correlation
from lowrank_optax.projectors.dct import dct as dct
from lowrank_optax.projectors.gaussian import gaussian as gaussian
from lowrank_optax.projectors.given import given as given
from lowrank_optax.projectors.grassmann import grassmann as grassmann
from lowrank_optax.projectors.lazy import lazy as lazy
from lowrank_optax.projectors.online_pca import online_pca as online_pca
from lowrank_optax.projectors.power import power as power
from lowrank_optax.projectors.power_iteration import (
    power_iteration as power_iteration,
)
from lowrank_optax.projectors.quantized import quantize_basis as quantize_basis
from lowrank_optax.projectors.sampled import sampled_svd as sampled_svd
from lowrank_optax.projectors.svd import svd as svd
from lowrank_optax.projectors.switched import switched as switched
from lowrank_optax.projectors.watched import watched as watched
from lowrank_optax.projectors.wavelet import wavelet as wavelet
from lowrank_optax.projectors.whole import whole as whole
