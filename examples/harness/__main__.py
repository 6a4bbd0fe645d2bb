"""The command `python -m examples.harness`: lm-evaluation-harness on a decoder here.

Its flags are those of `lm_eval`; `--model` is known.
"""

import sys

from examples.llama.config import UsageError
from examples.llama.run_folder import say


def main(args: list[str]) -> int:
    try:
        from examples.harness.model import NAME
    except ImportError as error:
        say(
            "error: the package lm-eval is missing: pip install "
            f"'lowrank-optax[harness]' ({error})"
        )
        return 2
    from lm_eval.__main__ import cli_evaluate  # type: ignore

    # It reads the command line itself.
    sys.argv = ["lm_eval", "run", "--model", NAME, *args]
    try:
        cli_evaluate()
    except UsageError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
