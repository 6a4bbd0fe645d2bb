"""`read_run` takes the model out of a folder that the trainer left."""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import lowrank_optax as lro
from examples.llama.checkpoint import Store, on_device
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params, abstract_model
from examples.llama.run_folder import brief, write_whole
from examples.llama.tokenizer import ByteTokenizer


def read_run(folder: pathlib.Path) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """The newest good checkpoint's model, its parameters and the run's settings.

    Weights that were kept in few bits are made whole.

    Raises:
        UsageError: there is none.
    """
    store = Store(folder)
    step, problems = store.newest_good()
    if step is None:
        why = "; ".join(f"{at}: {problem}" for at, problem in problems.items())
        raise UsageError(f"{folder} has no good checkpoint{f' ({why})' * bool(why)}")
    meta = store.meta(step)
    try:
        config = ModelConfig.from_json(meta["identity"]["model"])
        settings = dict(meta["settings"])
        weights = lro.weight_storage(
            settings["weights"], settings["param_dtype"], layer_axis=0
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the record of checkpoint {step} in {folder} is not of this program: "
            f"{error!r}"
        ) from error
    stored = jax.eval_shape(weights.store, abstract_model(config)[1])
    item = on_device({"params": stored})
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,  # without the optimizer's state
    )
    path = (store.folder / str(step)).absolute()
    with ocp.PyTreeCheckpointer() as orbax:
        try:
            found = orbax.restore(path, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UsageError(f"{path} cannot be read: {brief(error)}") from error
    return config, jax.jit(weights.load)(found["params"]), settings


def write_tokenizer(
    folder: pathlib.Path, settings: dict[str, Any], target: pathlib.Path
):
    """The run's tokenizer as transformers reads it, with its settings."""
    own = folder / "tokenizer.json"
    if settings.get("tokenizer") == "bytes":
        tokenizer, end = _bytes(), "<end>"
    elif own.is_file():
        tokenizer, end = tokenizers.Tokenizer.from_file(str(own)), "<eos>"
    else:
        raise UsageError(f"{folder} has no tokenizer.json")
    write_whole(target / "tokenizer.json", tokenizer.to_str())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    write_whole(target / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")
    ends = {"eos_token_id": tokenizer.token_to_id(end)}
    write_whole(target / "generation_config.json", json.dumps(ends, indent=2) + "\n")


def _bytes() -> tokenizers.Tokenizer:
    """A token is a byte: `ByteTokenizer` in the words of the library."""
    # The library writes a byte as a character: as itself where that can be printed, and
    # else as one of those from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    spelled = {byte: chr(byte) for byte in plain}
    spelled |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    vocab = {spelled[byte]: byte for byte in range(256)}
    inner = tokenizers.Tokenizer(models.BPE(vocab | {"<end>": ByteTokenizer.end}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    return inner
