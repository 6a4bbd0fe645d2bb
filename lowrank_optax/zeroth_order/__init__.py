"""Gradients from losses alone, without a backward pass; see ``zeroth_order``."""

from lowrank_optax.zeroth_order.directions import Directions as Directions
from lowrank_optax.zeroth_order.directions import lozo as lozo
from lowrank_optax.zeroth_order.directions import mezo as mezo
from lowrank_optax.zeroth_order.directions import subzero as subzero
from lowrank_optax.zeroth_order.directions import tezo as tezo
from lowrank_optax.zeroth_order.estimator import ZerothOrder as ZerothOrder
from lowrank_optax.zeroth_order.estimator import ZerothOrderState as ZerothOrderState
from lowrank_optax.zeroth_order.estimator import zeroth_order as zeroth_order
from lowrank_optax.zeroth_order.perturbed import Perturbed as Perturbed
from lowrank_optax.zeroth_order.perturbed import materialize as materialize
