"""``Name``: what the words of a leaf's path say about it.

Words are whole: ``abnormal_gate`` is no norm and ``sentence_embedder/attn`` no
embedding, since only the module that holds a leaf is asked, never what holds that.
"""

import dataclasses
import functools
import re

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Last keys that name an array within its module, in one framework or another.
_ARRAYS = _words(
    "kernel weight weights w value raw_value array embedding embeddings bias b scale"
    " gamma beta offset gain g params var data"
)
_VECTORS = _words("scale bias gamma beta offset gain")
_NORMS = _words(
    "norm norms layernorm rmsnorm groupnorm batchnorm layernormalization normalization"
    " ln bn gn"
)
_EMBEDDINGS = _words(
    "embed embeds embedding embeddings embedder emb embs wte wpe tte unembed"
    " unembedding unembedder"
)
# What stands behind "embed" in a name that is an embedding's all the same.
_EMBEDDED = _words("tokens token tok words word positions position pos in out types")
_HEADS = _words("head heads score scores logits logit classifier output vocab shared")
# Words of layers in the body of a model.
_ATTENTION = _words(
    "attn attention selfattention crossattention mha mhsa qkv kv q k v query key value"
    " queries keys values"
)
_INWARD = _words(
    "q k v qkv kv query key value queries keys values up gate wi fc1 w1 w3 c_fc fc_in"
    " up_proj gate_proj gate_up_proj in_proj"
)
_OUTWARD = _words("o out wo down fc2 w2 fc_out down_proj o_proj out_proj c_proj")
_BODY = _ATTENTION | _words(
    "mlp ffn ffw ff feedforward moe expert experts up down gate wi wo fc fc1 fc2 w1 w2"
    " w3 router mixer ssm conv convolution in_proj out_proj"
)
_LAYERS = _BODY | _words("proj projection linear dense kernel modulation")
_CONVOLUTIONS = _words("conv convs convolution convolutional")
_POSITIONS = _words(
    "wpe pos position positions positional rel relative type types time"
)
_LISTS = _words("layers layer modules variables trainable_variables params")
_EXPERTS = _words("moe expert experts")


@functools.lru_cache(maxsize=65536)
def words_of(component: str) -> tuple[str, ...]:
    """Returns the words of one key: ``LayerNorm_0`` is layer and norm."""
    return tuple(word.lower() for word in _WORD.findall(component))


@dataclasses.dataclass(frozen=True)
class Name:
    """A leaf's path, by its components.

    Attributes:
      path: keys joined by "/"; keys that hold "/" or "." themselves are split, too.
    """

    path: str

    @functools.cached_property
    def components(self) -> tuple[str, ...]:
        """The keys, without those that carry no meaning."""
        parts = re.split(r"[/.]", self.path)
        return tuple(part for part in parts if part not in ("", "~"))

    @functools.cached_property
    def place(self) -> tuple[str, ...]:
        """Where the leaf's module stands: its keys, without the array's own."""
        keys = self.components
        end = len(keys)
        while end and keys[end - 1] in _ARRAYS:
            end -= 1
        return keys[:end]

    @functools.cached_property
    def array(self) -> str:
        """The array's own key, "" if it has none."""
        named = self.components[len(self.place) :]
        return next((key for key in named if key not in ("array", "value")), "")

    @functools.cached_property
    def module(self) -> tuple[str, ...]:
        """The words of the module that holds the leaf."""
        return words_of(self.place[-1]) if self.place else ()

    @functools.cached_property
    def near(self) -> frozenset[str]:
        """The words, and the whole keys, of the module and what holds it."""
        near = self.place[-3:]
        return frozenset(near) | {word for key in near for word in words_of(key)}

    @property
    def is_bare(self) -> bool:
        """Whether only numbers, or lists of them, say where the leaf stands."""
        keys = self.components if not self.array else self.place
        return all(key.isdigit() or key in _LISTS for key in keys)

    @property
    def is_vector(self) -> bool:
        """Whether it is a gain or bias, or belongs to a norm."""
        if self.components and self.components[-1] in _VECTORS:
            return True
        return self.array in _VECTORS or self.is_norm

    @property
    def is_norm(self) -> bool:
        """Whether it belongs to a norm."""
        return self._speaks_of(_NORMS, frozenset())

    @property
    def is_embedding(self) -> bool:
        """Whether it is the table of an embedding, or the head ``lm_head``."""
        if self.array in ("embedding", "embeddings"):
            return True
        if self.module[-2:] == ("lm", "head"):
            return True
        return self._speaks_of(_EMBEDDINGS, _EMBEDDED)

    @property
    def is_position(self) -> bool:
        """Whether an embedding is one of positions or types, not of words."""
        return bool(self.near & _POSITIONS)

    @property
    def may_be_head(self) -> bool:
        """Whether it could be an output head; inside of layers such words differ."""
        module = self.module
        named = bool(module) and (module[-1] in _HEADS or module[0] in _HEADS)
        return named and not self.of_body

    @property
    def of_body(self) -> bool:
        """Whether it is a layer's in the body: attention, MLP, experts."""
        return bool(self.near & _BODY)

    @property
    def of_attention(self) -> bool:
        """Whether it belongs to an attention."""
        return bool(self.near & _ATTENTION)

    @property
    def of_experts(self) -> bool:
        """Whether it belongs to experts."""
        return any(_EXPERTS & {*words_of(key)} for key in self.place)

    @property
    def of_convolution(self) -> bool:
        """Whether it is a convolution's kernel."""
        return bool(_CONVOLUTIONS & {*self.module})

    @property
    def goes_in(self) -> bool:
        """Whether the layer reads the model's width: queries, up, gate."""
        return self._is(_INWARD) and not self._is(_OUTWARD)

    @property
    def goes_out(self) -> bool:
        """Whether the layer writes the model's width: out, down."""
        return self._is(_OUTWARD) and not self._is(_INWARD)

    def _is(self, known: frozenset[str]) -> bool:
        return bool(self.place) and bool(known & {self.place[-1], *self.module})

    def _speaks_of(self, known: frozenset[str], behind: frozenset[str]) -> bool:
        """Whether the module's last word is known, or its first with one behind it."""
        module = self.module
        if not module:
            return False
        if module[-1] in known:
            return True
        if module[0] not in known or len(module) != 2:
            return False
        return module[1] in behind if behind else module[1] not in _LAYERS

    def has(self, wanted: str) -> bool:
        """Whether a key of the path has these words, one after another."""
        asked = words_of(wanted)
        for key in self.components:
            if key == wanted:
                return True
            words = words_of(key)
            # Numbers count: w1 is not w2.
            if asked and not re.search(r"\d", wanted):
                ends = range(len(words) - len(asked) + 1)
                if any(words[i : i + len(asked)] == asked for i in ends):
                    return True
        return False
