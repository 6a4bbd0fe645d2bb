"""Published methods, one paper per file; the order of the lines is that of the tables.

A new method is one file and its line here: exports, tables and pages follow.
"""

from lowrank_optax.methods._registry import METHODS as METHODS
from lowrank_optax.methods._registry import Method as Method
from lowrank_optax.methods._static import static_args as static_args

from lowrank_optax.methods.galore import galore as galore
from lowrank_optax.methods.galore import scale_by_galore as scale_by_galore
from lowrank_optax.methods.galore import galore_adafactor as galore_adafactor
from lowrank_optax.methods.fira import fira as fira
from lowrank_optax.methods.fira import scale_by_fira as scale_by_fira
from lowrank_optax.methods.subtrack import subtrack as subtrack
from lowrank_optax.methods.subtrack import scale_by_subtrack as scale_by_subtrack
from lowrank_optax.methods.grass_walk import grass_walk as grass_walk
from lowrank_optax.methods.grass_walk import scale_by_grass_walk as scale_by_grass_walk
from lowrank_optax.methods.grass_walk import grass_jump as grass_jump
from lowrank_optax.methods.grass_walk import scale_by_grass_jump as scale_by_grass_jump
from lowrank_optax.methods.ldadam import ldadam as ldadam
from lowrank_optax.methods.ldadam import scale_by_ldadam as scale_by_ldadam
from lowrank_optax.methods.online_subspace_descent import (
    online_subspace_descent as online_subspace_descent,
)
from lowrank_optax.methods.online_subspace_descent import (
    scale_by_online_subspace_descent as scale_by_online_subspace_descent,
)
from lowrank_optax.methods.apollo import apollo as apollo
from lowrank_optax.methods.apollo import scale_by_apollo as scale_by_apollo
from lowrank_optax.methods.apollo import apollo_mini as apollo_mini
from lowrank_optax.methods.apollo import scale_by_apollo_mini as scale_by_apollo_mini
from lowrank_optax.methods.coap import coap as coap
from lowrank_optax.methods.coap import scale_by_coap as scale_by_coap
from lowrank_optax.methods.sara import sara as sara
from lowrank_optax.methods.sara import scale_by_sara as scale_by_sara
from lowrank_optax.methods.dct_adamw import dct_adamw as dct_adamw
from lowrank_optax.methods.dct_adamw import scale_by_dct_adamw as scale_by_dct_adamw
from lowrank_optax.methods.frugal import frugal as frugal
from lowrank_optax.methods.frugal import scale_by_frugal as scale_by_frugal
from lowrank_optax.methods.sumo import sumo as sumo
from lowrank_optax.methods.sumo import scale_by_sumo as scale_by_sumo
from lowrank_optax.methods.galore_plus import galore_plus as galore_plus
from lowrank_optax.methods.galore_plus import (
    scale_by_galore_plus as scale_by_galore_plus,
)
from lowrank_optax.methods.natural_galore import natural_galore as natural_galore
from lowrank_optax.methods.natural_galore import (
    scale_by_natural_galore as scale_by_natural_galore,
)
from lowrank_optax.methods.alice import alice as alice
from lowrank_optax.methods.alice import scale_by_alice as scale_by_alice
from lowrank_optax.methods.gwt import gwt as gwt
from lowrank_optax.methods.gwt import scale_by_gwt as scale_by_gwt
from lowrank_optax.methods.foam import foam as foam
from lowrank_optax.methods.foam import scale_by_foam as scale_by_foam
from lowrank_optax.methods.galore import galore_8bit as galore_8bit
from lowrank_optax.methods.galore import scale_by_galore_8bit as scale_by_galore_8bit
from lowrank_optax.methods.q_galore import q_galore as q_galore
from lowrank_optax.methods.q_galore import scale_by_q_galore as scale_by_q_galore
from lowrank_optax.methods.adamw_8bit import adamw_8bit as adamw_8bit
from lowrank_optax.methods.adamw_4bit import adamw_4bit as adamw_4bit
from lowrank_optax.methods.column_sgd import column_sgd as column_sgd
from lowrank_optax.methods.column_sgd import scale_by_column_sgd as scale_by_column_sgd
from lowrank_optax.methods.lora_pre import lora_pre as lora_pre
from lowrank_optax.methods.lora_pre import scale_by_lora_pre as scale_by_lora_pre
from lowrank_optax.methods.muon import muon as muon
from lowrank_optax.methods.muon import scale_by_muon as scale_by_muon
from lowrank_optax.methods.even_muon import even_muon as even_muon
from lowrank_optax.methods.even_muon import scale_by_even_muon as scale_by_even_muon
from lowrank_optax.methods.dion import dion as dion
from lowrank_optax.methods.dion import scale_by_dion as scale_by_dion
from lowrank_optax.methods.sinkgd import sinkgd as sinkgd
from lowrank_optax.methods.sinkgd import scale_by_sinkgd as scale_by_sinkgd
from lowrank_optax.methods.racs import racs as racs
from lowrank_optax.methods.racs import scale_by_racs as scale_by_racs
