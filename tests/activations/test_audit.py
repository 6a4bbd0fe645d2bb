"""What the compiler says of a program."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax import activations

SHAPES = [
    jax.ShapeDtypeStruct((64, 32), "float32"),
    jax.ShapeDtypeStruct((32, 16), "float32"),
]


def product(x, y):
    return jnp.sin(x @ y)


def test_bytes_and_operations_of_a_product():
    found = activations.audit(product, SHAPES)
    assert found.argument_bytes == 4 * (64 * 32 + 32 * 16)
    assert found.output_bytes == 4 * 64 * 16
    assert found.flops is not None and 1 <= found.flops / (2 * 64 * 32 * 16) < 1.1
    held = found.argument_bytes + found.output_bytes
    assert found.total_bytes == held + found.temp_bytes


def test_a_function_a_jitted_one_and_a_program_read_the_same():
    jitted = jax.jit(product)
    program = jitted.lower(*SHAPES).compile()
    assert (
        activations.audit(product, SHAPES)
        == activations.audit(jitted, SHAPES)
        == activations.audit(program)
    )


def test_memory_that_is_used_again_counts_once():
    x = jax.ShapeDtypeStruct((64, 32), "float32")
    once = activations.audit(jax.jit(lambda x: 2 * x, donate_argnums=0), [x])
    twice = activations.audit(lambda x: 2 * x, [x])
    assert once.alias_bytes == 8192 and "of them reused" in str(once)
    assert twice.total_bytes - once.total_bytes == 8192


def test_the_table():
    text = str(activations.Audit(1 << 20, 1 << 19, 0, 3 << 20, None, 2.5e9))
    assert text.splitlines() == [
        "arguments               1.00 MiB",
        "outputs                 0.50 MiB",
        "temporaries             3.00 MiB",
        "total                   4.50 MiB",
        "operations           2.500 GFLOP",
    ]


def test_bad_input():
    with pytest.raises(TypeError, match="must be a function or a compiled program"):
        activations.audit(3)

    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="gives no account of memory"):
        activations.audit(Silent())
