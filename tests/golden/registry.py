"""Which methods the golden cases replay: a new method is one entry."""

from tests.golden.galore import galore_adafactor, galore_adamw

# `method` in a case's config -> function (case) -> Replay.
METHODS = {
    "galore_adamw": galore_adamw,
    "galore_adafactor": galore_adafactor,
}
