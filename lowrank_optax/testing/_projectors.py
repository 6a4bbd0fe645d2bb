"""What every projector owes the bracket, on hard matrices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors import At, OrthonormalProjector, Projector
from lowrank_optax.testing._assertions import (
    assert_bit_equal,
    assert_orthonormal,
    assert_state_stable,
)
from lowrank_optax.testing._matrices import HARD_MATRICES, HARD_SHAPES, hard_matrix


def assert_projector_laws(
    projector: Projector,
    *,
    shapes: Any = HARD_SHAPES,
    energy: float | None = None,
) -> None:
    """Asserts what every projector owes the bracket, on all hard matrices.

    On every shape and kind, from a cold and from a warm start:

    * nothing stored changes structure, shape or dtype;
    * a zero or non-finite gradient leaves what is stored as it was, bit for bit;
    * after any other the lifted update ``P P^T G`` is finite, the same bits come out
      twice, and a basis of an ``OrthonormalProjector`` is orthonormal;
    * ``down`` and ``up`` are adjoint: ``<P^T X, Y> = <X, P Y>``;
    * if asked for, a cold refresh captures that share of what the best subspace of
      its rank would: ``|P^T G|^2 >= energy * (s_1^2 + ... + s_r^2)``.

    Args:
      projector: the projector; its rank is clipped to the shapes.
      shapes: (m, n) pairs to try.
      energy: least share of the best energy, None to claim nothing.

    Raises:
      AssertionError: naming the law, the kind of matrix and its shape.

    Examples:
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.testing import assert_projector_laws
      >>> assert_projector_laws(lro.svd(rank=2), shapes=[(6, 4)], energy=0.999)
    """
    side: dict[str, Any] = {"side": "left"}
    if projector.side_of(_matrix(2, 2), None) is not None:
        side = {}  # of its own
    if projector.stores_basis:
        # Due at every step, so that one step from a warm state is a refresh.
        projector = dataclasses.replace(projector, update_proj_gap=1)
    bracket = project(projector, select=".*", clip_rank=True, **side)
    tx = chain(bracket, optax.identity(), backproject())
    # One program each for a shape: operation by operation there would be dozens.
    start, step = jax.jit(tx.init), jax.jit(tx.update)
    for m, n in shapes:
        cold = start(jnp.zeros((m, n)))
        warm = step(jnp.asarray(hard_matrix("gaussian", m, n, seed=1)), cold)[1]
        for kind in HARD_MATRICES:
            gradient = jnp.asarray(hard_matrix(kind, m, n))
            try:
                _assert_guarded(projector, step, gradient, cold)
                _assert_guarded(projector, step, gradient, warm)
                if energy is not None and _healthy(gradient):
                    _assert_energy(step(gradient, cold)[1].basis, gradient, energy)
            except AssertionError as error:
                raise AssertionError(f"{kind} {m} x {n}: {error}") from error
        _assert_adjoint(projector, m, n, warm.basis)


def _healthy(gradient: jax.Array) -> bool:
    values = np.asarray(gradient)
    return bool(np.isfinite(values).all() and values.any())


def _assert_guarded(projector: Projector, step, gradient, state) -> None:
    updates, after = step(gradient, state)
    assert_state_stable(state, after)
    assert_bit_equal((updates, after), step(gradient, state))
    if isinstance(projector, OrthonormalProjector):
        assert_orthonormal(after.basis)
    if not _healthy(gradient):
        assert_bit_equal(state.basis, after.basis)
    elif not np.isfinite(np.asarray(updates)).all():
        raise AssertionError("the update of a finite gradient is not finite")


def _assert_energy(basis, gradient, energy: float) -> None:
    wide = np.asarray(gradient, np.float64)
    basis = np.asarray(basis, np.float64)
    spectrum = np.linalg.svd(wide, compute_uv=False)
    # By Eckart and Young no subspace of this rank holds more.
    best = np.sum(spectrum[: basis.shape[1]] ** 2)
    captured = np.sum((basis.T @ wide) ** 2)
    if not captured >= energy * best:
        raise AssertionError(
            f"captures {captured / best:.6f} of the best energy, less than {energy}"
        )


def _assert_adjoint(projector: Projector, m: int, n: int, stored: Any) -> None:
    matrix = _matrix(m, n)
    matrix = matrix.seen_from(projector.side_of(matrix, None) or "left")
    rank = min(projector.rank_of(matrix), projector.largest_rank(matrix))
    matrix = dataclasses.replace(matrix, rank=rank)
    zero = jnp.int32(0)
    at = At(jax.random.key(0), zero, zero, jnp.bool_(False))

    @jax.jit
    def down(stored, x):
        x = Operand.of(x, matrix.transposed)
        return projector.down(matrix, projector.basis(matrix, stored, at), x)

    @jax.jit
    def up(stored, y):
        return projector.up(matrix, projector.basis(matrix, stored, at), y).array

    x = np.asarray(hard_matrix("gaussian", matrix.m, matrix.n, seed=2))
    low = np.asarray(down(stored, x))
    y = np.asarray(hard_matrix("gaussian", *low.shape, seed=3))
    there, back = float(np.vdot(low, y)), float(np.vdot(x, up(stored, y)))
    # Two sums of m n r products in float32, in different orders.
    bound = 1e-5 * float(np.linalg.norm(x) * np.linalg.norm(y)) * max(rank, 1)
    if not abs(there - back) <= bound:
        raise AssertionError(
            f"{m} x {n}: down and up are not adjoint: {there} and {back}"
        )


def _matrix(m: int, n: int) -> Matrix:
    return Matrix("", (m, n), (), (0,), (1,), "left", 1)
