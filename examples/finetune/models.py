"""`Model` is a pretrained model made ready; `Parts` says what of it is trained."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from examples.convert import read_model
from examples.encoder.model import EncoderConfig
from examples.encoder.model import abstract_model as abstract_encoder
from examples.finetune.adapter import adapt, with_factors
from examples.finetune.config import FinetuneConfig
from examples.llama.config import UsageError
from examples.llama.model import Params, abstract_model
from examples.llama.run_folder import brief, read_text
from examples.llama.step import joined

_LARGEST = 2**27  # bytes of a tokenizer.json
_PIECE = 2**16
EMBEDDINGS = r"(embed|positions|types)/.*"
HEADS = r"(lm_head|classifier|mlm)/.*"


@dataclasses.dataclass
class Pretrained:
    """A model as it was read: its shape, weights in host memory, tokenizer."""

    folder: pathlib.Path
    config: Any
    params: Params
    tokenizer: tokenizers.Tokenizer

    @property
    def encoder(self) -> bool:
        return isinstance(self.config, EncoderConfig)

    def fingerprint(self) -> str:
        """A hash of names, sizes and the first 64 KiB of the weights' files."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_PIECE))
        digest.update(self.tokenizer.to_str().encode())
        return digest.hexdigest()[:16]


def load_pretrained(folder: str, flag: str = "--model") -> Pretrained:
    """The model of a folder.

    Raises:
        UsageError: the folder, its weights or its tokenizer cannot be used.
    """
    place = pathlib.Path(folder).expanduser()
    if not folder or not place.is_dir():
        what = f"{folder} is no folder" if folder else "names no folder"
        raise UsageError(
            f"{flag} {what}: give one with config.json, model.safetensors and "
            "tokenizer.json"
        )
    tokenizer = load_tokenizer(place)
    config, params = read_model(place)
    # Its parameters may be fewer than the table of its tokens is long, not more.
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > config.vocab_size:
        raise UsageError(
            f"{place}/tokenizer.json has tokens up to {size - 1}, the model "
            f"{config.vocab_size} from 0 on"
        )
    return Pretrained(place, config, params, tokenizer)


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(
            f"{folder} has no tokenizer.json; one that is there in another form is "
            "written anew by transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(read_text(path, _LARGEST))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's own is bare, or a panic of Rust
        raise UsageError(f"{path} cannot be read: {brief(error)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def paths(params: Params) -> list[str]:
    """Paths of all leaves, keys joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]


def divided(
    params: Params, first: Callable[[str], bool], prefix: str = ""
) -> tuple[Params, Params]:
    """Two trees: the leaves of which `first` is true, and the rest."""
    found: tuple[Params, Params] = ({}, {})
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            parts = divided(value, first, f"{path}/")
        else:
            parts = ({}, value) if not first(path) else (value, {})
        for into, part in zip(found, parts, strict=True):
            if not isinstance(part, dict) or part:
                into[name] = part
    return found


@dataclasses.dataclass(frozen=True)
class Parts:
    """What of a model is trained, and what of that is projected, by the flags."""

    config: FinetuneConfig
    tied: bool
    # A language model's head that a classifier does not use.
    unused: str = ""

    def __post_init__(self) -> None:
        if self.tied and self.config.head != "full":
            raise UsageError(
                f"--head {self.config.head}: the head of this model is its embedding; "
                "say --embeddings"
            )

    @property
    def embeddings(self) -> str:
        return self.config.embeddings or ("frozen" if self.config.adapter else "full")

    def trained(self, path: str) -> bool:
        config = self.config
        if self.unused and re.fullmatch(self.unused, path):
            return False
        if re.fullmatch(EMBEDDINGS, path):
            return self.embeddings != "frozen"
        if re.fullmatch(HEADS, path):
            return config.head != "frozen"
        if config.adapter:
            return path.endswith(("/lora_a", "/lora_b"))
        return config.layers != "frozen"

    def select(self) -> Any:
        """What is projected, as the methods take it; None: as they choose."""
        config = self.config
        more = "projected" in (self.embeddings, config.head)
        if not config.select and not more:
            return None
        if config.select == "all-linear" and not more:
            return "all-linear"
        words = [word for word in config.select.split(",") if word]
        if config.select in ("", "all-linear"):
            words = ["kernel", "lora_a", "lora_b"]

        def projected(path: str, leaf: Any) -> bool:
            if re.fullmatch(r"embed/.*", path):
                return self.embeddings == "projected"
            if re.fullmatch(HEADS, path):
                return config.head == "projected" and leaf.ndim == 2
            there = set(path.split("/"))
            return leaf.ndim == 3 and bool(there & {*words})

        return projected


class Model:
    """A pretrained model made ready: definition, shapes and first values.

    Attributes:
      config: its shape.
      definition: with adapters, where they were asked for.
      trained, frozen: shapes.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        config: FinetuneConfig,
        dtypes: dict[str, str],
        more: Params | None = None,
    ):
        """`more` are arrays of a new head, beside those of the model."""
        self.pretrained, self.flags = pretrained, config
        self.config = dataclasses.replace(pretrained.config, **dtypes)
        make = abstract_encoder if pretrained.encoder else abstract_model
        self.plain, shapes = make(self.config)
        self.definition = self.plain
        if config.adapter:
            self.definition, shapes = adapt(
                self.plain,
                shapes,
                config.lora_targets,
                config.lora_rank,
                config.lora_alpha,
            )
        self.shapes, self.more = shapes, more or {}
        tied = not pretrained.encoder and self.config.tied
        unused = r"lm_head/.*" if self.more else ""
        self.parts = Parts(config, tied and not self.more, unused)
        heads = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.more
        )
        self.trained, self.frozen = divided(shapes | heads, self.parts.trained)
        if not self.trained:
            raise UsageError("nothing is trained: all of the model is frozen")
        self._check_select()

    def _check_select(self) -> None:
        """Raises where words choose nothing."""
        choose = self.parts.select()
        shapes = jax.tree.leaves(self.trained)
        if callable(choose) and not any(map(choose, paths(self.trained), shapes)):
            raise UsageError(
                f"--select {self.flags.select} names no matrix that is trained; those "
                "of the layers are at paths such as "
                + ", ".join([p for p in paths(self.trained) if "kernel" in p][:3])
            )

    def arrays(self) -> tuple[Params, Params]:
        """First values of what is trained and of what is not, in host memory; once."""
        # As large as the model, and of no use when they lie on devices.
        params, self.pretrained.params = self.pretrained.params, {}
        if self.flags.adapter:
            params = with_factors(params, self.shapes, self.flags.seed)
        dtype = jnp.dtype(self.config.param_dtype)
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
        return divided(params | self.more, self.parts.trained)

    def joined(self, trained: Params, frozen: Params) -> Params:
        """The whole model again."""
        return joined(trained, frozen)
