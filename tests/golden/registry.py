"""Which methods the golden cases replay: a new method is one entry."""

from tests.golden.fira import fira_adamw
from tests.golden.galore import galore_adafactor, galore_adamw
from tests.golden.tracking import ldadam, subtrackpp

# `method` in a case's config -> function (case) -> Replay.
METHODS = {
    "galore_adamw": galore_adamw,
    "galore_adafactor": galore_adafactor,
    "fira_adamw": fira_adamw,
    "subtrackpp": subtrackpp,
    "ldadam": ldadam,
}
