"""One generator of the matrices that break low-rank code."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

HARD_SHAPES = ((1, 1), (1, 6), (6, 1), (5, 5), (12, 8), (3, 40))
"""Shapes worth trying: a single row, column or element, square, tall and wide."""


def _factors(rng: np.random.Generator, m: int, n: int):
    k = min(m, n)
    # The QR factors of Gaussian matrices: orthonormal, in random directions.
    left = np.linalg.qr(rng.standard_normal((m, k)))[0]
    right = np.linalg.qr(rng.standard_normal((n, k)))[0]
    return left, right


def _spectrum(values: Callable[[np.ndarray], Any]):
    """A matrix with random singular vectors and singular values ``values(0..k-1)``."""

    def build(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
        left, right = _factors(rng, m, n)
        return (left * values(np.arange(left.shape[1], dtype=float))) @ right.T

    return build


def _scaled(scale: float):
    return lambda rng, m, n: scale * rng.standard_normal((m, n))


def _one_element(value: float, background: float = 1.0):
    def build(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
        matrix = background * rng.standard_normal((m, n))
        matrix[rng.integers(m), rng.integers(n)] = value
        return matrix

    return build


_BUILDERS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "gaussian": _scaled(1.0),
    "zero": lambda rng, m, n: np.zeros((m, n)),
    "all_equal": lambda rng, m, n: np.full((m, n), 0.7),
    # Ranks below that of most bases: some vectors have nothing to follow.
    "one_element": _one_element(1.0, background=0.0),
    "rank_one": _spectrum(lambda i: 1.0 * (i == 0)),
    "rank_two": _spectrum(lambda i: 1.0 * (i < 2)),
    # Equal singular values, whose singular vectors are not unique.
    "repeated": _spectrum(np.ones_like),
    "repeated_pairs": _spectrum(lambda i: 2.0 ** -(i // 2)),
    # Falling singular values, at last below the rounding of the first.
    "power_law": _spectrum(lambda i: (1.0 + i) ** -2),
    "geometric": _spectrum(lambda i: 10.0**-i),
    # Squares of the tiny vanish in float32, fourth powers of the huge overflow.
    "tiny": _scaled(1e-20),
    "huge": _scaled(1e15),
    "nan": _one_element(np.nan),
    "inf": _one_element(np.inf),
    "minus_inf": _one_element(-np.inf),
    "all_nan": lambda rng, m, n: np.full((m, n), np.nan),
}

HARD_MATRICES = tuple(_BUILDERS)
"""Names of the kinds of ``hard_matrix``; the last four are not finite."""

_NOT_FINITE = ("nan", "inf", "minus_inf", "all_nan")


def hard_matrix(kind: str, m: int, n: int, seed: int = 0) -> np.ndarray:
    """Builds one hard matrix in float32.

    Args:
      kind: one of ``HARD_MATRICES``.
      m: rows.
      n: columns.
      seed: seed of everything random in it.

    Returns:
      The matrix ``[m, n]``.

    Raises:
      ValueError: if ``kind`` is unknown.

    Examples:
      >>> import numpy as np
      >>> from lowrank_optax.testing import hard_matrix
      >>> int(np.linalg.matrix_rank(hard_matrix("rank_one", 6, 4)))
      1
    """
    if kind not in _BUILDERS:
        raise ValueError(f"`kind` must be one of {HARD_MATRICES}; got {kind!r}.")
    build = _BUILDERS[kind]
    return build(np.random.default_rng(seed), m, n).astype(np.float32)


def hard_matrices(
    shapes: Sequence[tuple[int, int]] = HARD_SHAPES, finite: bool | None = None
) -> st.SearchStrategy[np.ndarray]:
    """Draws hard matrices: a hypothesis strategy.

    Shapes come from a short list, so that a jitted property compiles once for each.

    Args:
      shapes: the shapes to draw from.
      finite: True or False to draw only finite ones, or only the others.

    Returns:
      A strategy of float32 arrays.

    Examples:
      >>> import hypothesis, numpy as np
      >>> from lowrank_optax.testing import hard_matrices
      >>> @hypothesis.settings(max_examples=5, database=None)
      ... @hypothesis.given(hard_matrices(finite=True))
      ... def test(matrix):
      ...     assert np.isfinite(matrix).all()
      >>> test()
    """
    kinds = [
        kind
        for kind in HARD_MATRICES
        if finite is None or finite == (kind not in _NOT_FINITE)
    ]
    return st.builds(
        lambda kind, shape, seed: hard_matrix(kind, shape[0], shape[1], seed),
        st.sampled_from(kinds),
        st.sampled_from(tuple(shapes)),
        st.integers(0, 999),
    )
