"""Which methods the golden cases replay: a new method is one entry."""

from tests.golden.alice import alice
from tests.golden.apollo import apollo
from tests.golden.coap import coap, coap_tucker2
from tests.golden.dct import dct_adamw
from tests.golden.dion import dion
from tests.golden.dion2 import dion2
from tests.golden.eight_bit import galore_adamw8bit
from tests.golden.fira import fira_adamw
from tests.golden.foam import foam
from tests.golden.galore import galore_adafactor, galore_adamw
from tests.golden.gwt import gwt
from tests.golden.osd import online_subspace_descent
from tests.golden.scale import scale
from tests.golden.stateless import racs, sinkgd
from tests.golden.tracking import ldadam, subtrackpp

# `method` in a case's config -> function (case) -> Replay.
METHODS = {
    "galore_adamw": galore_adamw,
    "galore_adafactor": galore_adafactor,
    "galore_adamw8bit": galore_adamw8bit,
    "fira_adamw": fira_adamw,
    "subtrackpp": subtrackpp,
    "ldadam": ldadam,
    "apollo": apollo,
    "coap": coap,
    "coap_tucker2": coap_tucker2,
    "dct_adamw": dct_adamw,
    "gwt": gwt,
    "online_subspace_descent": online_subspace_descent,
    "scale": scale,
    "alice": alice,
    "dion": dion,
    "dion2": dion2,
    "foam": foam,
    "sinkgd": sinkgd,
    "racs": racs,
}
