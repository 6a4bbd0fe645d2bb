"""The command `python -m examples.finetune`; exit codes are those of the trainer."""

import sys
from collections.abc import Sequence

from examples.finetune.config import FinetuneConfig
from examples.finetune.tasks import make_task
from examples.llama.command_line import TRAINING, parsed
from examples.llama.run_folder import say
from examples.llama.train import run_command


def main(args: Sequence[str] | None = None) -> int:
    config = parsed(FinetuneConfig, "python -m examples.finetune", args, TRAINING)
    if config.verify and not config.run_dir:
        say("error: --verify needs the --run-dir to look at")
        return 2
    return run_command(config, make_task)


if __name__ == "__main__":
    sys.exit(main())
