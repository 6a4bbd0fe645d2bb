"""`make_task` makes what the trainer trains, by `--task`."""

from examples.finetune.answering import Instructions
from examples.finetune.classification import Classification
from examples.finetune.config import FinetuneConfig, check
from examples.finetune.task import FinetuneTask


def make_task(config: FinetuneConfig) -> FinetuneTask:
    """The task that the flags name."""
    check(config)
    kinds = {"sft": Instructions, "classify": Classification}
    return kinds[config.task](config)
