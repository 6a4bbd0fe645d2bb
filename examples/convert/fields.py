"""`Fields` takes the fields of a `config.json` one by one, each checked.

Every field is either understood, known to change nothing in the forward pass, or empty;
any other is an error that names it. A converter that passes over what it does not know
is silently wrong.
"""

import math
import re
from typing import Any

from examples.llama.config import UsageError

# Fields without a part in the forward pass of a model that is not being trained.
_NEUTRAL = re.compile(
    r"_.*|.*_token_id|.*dropout.*|.*version|torch_dtype|dtype|architectures|model_type"
    r"|use_cache|cache_implementation|pretraining_tp|unsloth.*"
    r"|transformers\.js_config|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|name_or_path|return_dict|output_.*|gradient_checkpointing"
    r"|chunk_size_feed_forward|tokenizer_class|prefix|is_llama_config|use_bfloat16"
    r"|pooler_.*|directionality|classifier_.*|.*_token|keys_to_ignore_at_inference"
    r"|use_return_dict|torchscript|attn_implementation|model_max_length"
    # Old files have the settings of text generation here.
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups"
    r"|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty"
    r"|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|suppress_tokens|begin_suppress_tokens"
    r"|exponential_decay_length_penalty|remove_invalid_values"
)
# Values that say: as ever.
_AS_EVER = {"partial_rotary_factor": 1, "position_embedding_type": "absolute"}


class Fields:
    """The fields of a `config.json`, each taken once and checked."""

    def __init__(self, raw: dict[str, Any]):
        self._left = dict(raw)

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def size(self, name: str, default: int | None = None, most: int = 2**20) -> int:
        """A whole number from 1 on; without a default it must be there."""
        value = self.take(name)
        value = default if value is None else value
        if value is None:
            raise UsageError(f"config.json has no {name}")
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(
                f"config.json: {name} must be a whole number from 1 to {most:,}; got "
                f"{short(value)}"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.take(name)
        value = default if value is None else value
        if not is_number(value) or not 0 < value < math.inf:
            raise UsageError(
                f"config.json: {name} must be a positive number; got {short(value)}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise UsageError(
                f"config.json: {name} must be true or false; got {short(value)}"
            )
        return value

    def close(self, model_type: str) -> None:
        """Raises if a field is left that may change the result."""
        for name, value in self._left.items():
            as_ever = name in _AS_EVER and value == _AS_EVER[name]
            if value and not as_ever and not _NEUTRAL.fullmatch(name):
                raise UsageError(
                    f"config.json: {name} = {short(value)} is not supported for "
                    f"{model_type}; a field that does not change the forward pass can "
                    "be removed from the file"
                )


def short(value: Any) -> str:
    """A value of a file in a part of a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62
