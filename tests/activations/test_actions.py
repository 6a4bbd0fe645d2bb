"""Names of actions, policies, the roles of a transformer, and bad input."""

import functools
import pickle

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations
from lowrank_optax.activations.checkpoint import actions as module
from lowrank_optax.activations.checkpoint import policy as policies
from tests.activations.model import TAGS, block, inputs

Quantize, Policy = activations.Quantize, activations.Policy
compress = activations.compressed_checkpoint
X = jnp.ones((4, 32))


def tagged(x):
    return checkpoint_name(2 * x, "a") + checkpoint_name(3 * x, "b")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("save", activations.Save()),
        ("recompute", activations.Recompute()),
        ("offload", activations.Offload()),
        ("int8", Quantize(8)),
        ("int4", Quantize(4)),
        ("int4+8", Quantize(4, 8)),
        ("int8+16", Quantize(8, 16)),
    ],
)
def test_every_action_has_a_name(text, action):
    assert activations.parse_action(text) == action
    assert str(action) == text
    assert activations.parse_action(action) is action
    assert hash(pickle.loads(pickle.dumps(action))) == hash(action)


def test_options_hold_for_actions_given_as_strings():
    found = Policy({"a": "int4+2", "b": Quantize(8)}, group=64, stochastic=True)
    assert found["a"] == Quantize(4, 2, 64, True)
    assert found["b"] == Quantize(8)
    assert str(found["a"]) == "int4+2 group 64 stochastic"


@pytest.mark.parametrize(
    "text", ["int2", "int4+", "int4+-1", "INT8", "", "int40", "drop", 4, None, ["save"]]
)
def test_an_unknown_action_names_the_known_ones(text):
    known = r"'save', 'recompute', 'offload', 'int8', 'int4'.*'int4\+8'; got "
    with pytest.raises(ValueError, match=known):
        compress(tagged, {"a": text})


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "`bits` must be one of 4, 8", lambda: Quantize(5)),
        (TypeError, "`outliers` must be an int", lambda: Quantize(4, 1.5)),
        (ValueError, "`outliers` must be at least 0", lambda: Quantize(4, -1)),
        (ValueError, "`group` must be at least 1", lambda: Quantize(4, group=0)),
        (ValueError, "`stochastic` must be one of", lambda: Quantize(stochastic=2)),
        (TypeError, "must map tags to actions", lambda: Policy(["a"])),
        (TypeError, "must map tags to actions", lambda: Policy({1: "save"})),
        (ValueError, "`role` must be one of .*'query_key'",
         lambda: activations.transformer_policy({"q": "query"})),
        (ValueError, "`role` must be one of",
         lambda: activations.transformer_policy(queries="int4")),
    ],
)  # fmt: skip
def test_bad_arguments(error, match, make):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("action", ["save", "int4", "recompute"])
def test_a_tag_that_does_not_occur_names_those_that_do(action):
    with pytest.raises(
        ValueError, match=r"lists 'c', .* does not tag. It tags 'a', 'b'"
    ):
        compress(tagged, {"a": "save", "c": action})(X)


def test_a_function_without_tags_says_how_to_tag():
    with pytest.raises(ValueError, match=r"tags nothing.*checkpoint_name\(q, 'q'\)"):
        compress(jnp.sin, {"a": "save"})(X)
    assert compress(jnp.sin, {})(X).shape == X.shape


def test_an_argument_that_is_no_array_says_what_to_do():
    def fn(x, mode):
        return x if mode == "a" else 2 * x

    with pytest.raises(TypeError, match=r"must be arrays.*'b'.*functools.partial"):
        compress(fn, {})(X, "b")
    assert (compress(functools.partial(fn, mode="b"), {})(X) == 2).all()


def test_a_policy_is_a_mapping_and_a_key():
    policy = Policy({"q": "int8", "a": "save"})
    assert list(policy) == ["a", "q"] and len(policy) == 2 and "q" in policy
    assert {policy: 1}[Policy({"a": "save", "q": "int8"})] == 1
    assert policy != Policy({"a": "save", "q": "int4"})
    assert policy.kept("b") is None and Policy({"b": "recompute"}).kept("b") is None
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert Policy() == Policy({})


def test_roles():
    policy = activations.transformer_policy(norm="int4+8", group=64)
    assert policy["norm1"] == Quantize(4, 8, 64)
    assert policy["q"] == Quantize(8, group=64) and "act" not in policy
    params, x = inputs(layers=1)
    params = jax.tree.map(lambda p: p[0], params)
    found = activations.tagged_values(block, params, x)
    assert [value.tag for value in found] == list(TAGS)
    assert set(policies.TRANSFORMER_TAGS) == set(TAGS)
    compress(block, policy)(params, x)  # every tag occurs


def test_an_action_of_your_own():
    class Halved(activations.Action):
        """Half the value."""

        def compress(self, x, key=None):
            return x.astype(jnp.bfloat16)

        def decompress(self, kept, like):
            return kept.astype(like.dtype) / 2

    def fn(x):
        return jnp.sum(checkpoint_name(x, "x") ** 2)

    gradient = jax.grad(compress(fn, {"x": Halved()}))(X)
    assert (gradient == 1).all()  # 2 x' = x


def test_offload_keeps_on_the_device_where_there_is_no_host_memory(monkeypatch):
    action = activations.Offload()
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    there = "pinned_host" in kinds
    assert module.has_host_memory() == there
    kept = action.compress(X)
    assert (kept.sharding.memory_kind == "pinned_host") == there
    assert action.decompress(kept, X).sharding.memory_kind == X.sharding.memory_kind
    assert action.nbytes(X.shape, X.dtype) == (0 if there else X.nbytes)
    monkeypatch.setattr(module, "has_host_memory", lambda: False)
    assert action.compress(X) is X and action.decompress(X, X) is X
    assert action.nbytes(X.shape, X.dtype) == X.nbytes
