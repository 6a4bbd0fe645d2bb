"""Gradients summed where they are small; see ``average``."""

from lowrank_optax.distributed.average import TrafficReport as TrafficReport
from lowrank_optax.distributed.average import pmean as pmean
from lowrank_optax.distributed.average import refresh_due as refresh_due
from lowrank_optax.distributed.average import traffic_report as traffic_report
from lowrank_optax.distributed.average import value_and_grad as value_and_grad
from lowrank_optax.distributed.compression import LeafTraffic as LeafTraffic
