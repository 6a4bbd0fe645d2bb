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

    In a bracket, on every shape and kind, from a cold and from a warm start:

    * nothing stored changes structure, shape or dtype;
    * a zero or non-finite gradient leaves what is stored as it was, bit for bit;
    * after any other the lifted update ``P P^T G`` is finite, the same bits come out
      twice, and a basis of an ``OrthonormalProjector`` is orthonormal;
    * ``down`` and ``up`` are adjoint: ``<P^T X, Y> = <X, P Y>``;

    And alone, without the bracket's guard, which keeps the old basis where a new one is
    not finite, on gradients between 1e-10 and 1e10:

    * what ``refresh`` returns is finite, and as ``start`` in structure, shape and dtype
      once it is packed; ``down`` gives ``[r, n]`` and ``up`` ``[m, n]``, both finite;
    * a program that is traced and compiled anew gives the same bits: nothing is drawn
      but from ``at.key``;
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
        # A basis of another type would be an error of JAX's inside the bracket.
        _Alone(projector, m, n).check_types(jnp.ones((m, n)))
    again = _compiled_twice(shapes)
    for m, n in shapes:
        alone = _Alone(projector, m, n)
        cold = start(jnp.zeros((m, n)))
        warm = step(jnp.asarray(hard_matrix("gaussian", m, n, seed=1)), cold)[1]
        for kind in HARD_MATRICES:
            gradient = jnp.asarray(hard_matrix(kind, m, n))
            try:
                _assert_guarded(projector, step, gradient, cold)
                _assert_guarded(projector, step, gradient, warm)
                if _healthy(gradient) and 1e-10 < jnp.max(jnp.abs(gradient)) < 1e10:
                    alone.check(gradient, (m, n) in again)
                    if energy is not None:
                        basis = step(gradient, cold)[1].basis
                        _assert_energy(basis, gradient, energy)
            except AssertionError as error:
                raise AssertionError(f"{kind} {m} x {n}: {error}") from error
        _assert_adjoint(projector, m, n, warm.basis)


def _compiled_twice(shapes: Any) -> set[tuple[int, int]]:
    """The largest tall and the largest wide shape: a second program costs seconds."""
    sides = ([s for s in shapes if (s[0] >= s[1]) == tall] for tall in (True, False))
    return {tuple(max(side, key=np.prod)) for side in sides if side}


class _Alone:
    """A projector's own functions on one matrix, with no bracket around them."""

    def __init__(self, projector: Projector, m: int, n: int):
        matrix = _matrix(m, n)
        matrix = matrix.seen_from(projector.side_of(matrix, None) or "left")
        rank = min(projector.rank_of(matrix), projector.largest_rank(matrix))
        self.matrix = dataclasses.replace(matrix, rank=rank)
        self.projector = projector.for_leaf(matrix.path)
        self.started = self.projector.start(self.matrix)
        self.programs: list[Any] = [jax.jit(self._made()), jax.jit(self._made())]

    def _made(self) -> Any:
        """Returns a function of its own, so that `jit` traces it anew."""

        def refresh(gradient: jax.Array, stored: Any, cold: jax.Array) -> Any:
            matrix, zero = self.matrix, jnp.int32(0)
            at = At(jax.random.key(0), zero, zero, cold, (), zero)
            seen, new = Operand(gradient, matrix.transposed), stored
            if self.projector.stores_basis:
                new = self.projector.refresh(matrix, seen, stored, at)
                stored = self.projector.pack(new)
            basis = self.projector.basis(matrix, stored, at)
            low = self.projector.down(matrix, basis, seen)
            return new, stored, low, self.projector.up(matrix, basis, low).array

        return refresh

    def check_types(self, gradient: jax.Array) -> None:
        m, n = gradient.shape
        try:
            shapes = jax.eval_shape(self._made(), gradient, self.started, jnp.bool_(0))
        except Exception as error:  # whatever its code raises on another's types
            name = type(self.projector).__name__
            raise AssertionError(
                f"{name} cannot be traced on {m} x {n}: {error}"
            ) from error
        try:
            self._check(*shapes, abstract=True)
        except AssertionError as error:
            raise AssertionError(f"{m} x {n}: {error}") from error

    def check(self, gradient: jax.Array, twice: bool) -> None:
        stored = self.started
        for cold in (True, False):
            arguments = gradient, stored, jnp.bool_(cold)
            found = self.programs[0](*arguments)
            self._check(*found)
            if twice:
                try:
                    assert_bit_equal(found, self.programs[1](*arguments))
                except AssertionError as error:
                    raise AssertionError(
                        "a second program gives other bits: does it draw from numpy, "
                        f"or read a clock, in place of `at.key`? {error}"
                    ) from error
            stored = found[1]

    def _check(
        self, new: Any, stored: Any, low: Any, lifted: Any, abstract: bool = False
    ) -> None:
        name, matrix = type(self.projector).__name__, self.matrix
        for part in () if abstract else jax.tree.leaves((new, low, lifted)):
            if jnp.issubdtype(part.dtype, jnp.inexact) and not jnp.isfinite(part).all():
                raise AssertionError(
                    f"{name}.refresh is not finite; the bracket would keep the old "
                    "basis for good"
                )
        _assert_like(f"what {name} stores", self.started, stored)
        expected = (matrix.m, matrix.n)
        if lifted.shape != expected:
            raise AssertionError(f"{name}.up gives {lifted.shape}, not {expected}")
        if low.ndim != 2 or low.shape[1] != matrix.n:
            raise AssertionError(f"{name}.down gives {low.shape}, not [r, {matrix.n}]")


def _assert_like(what: str, expected: Any, found: Any) -> None:
    """Raises unless two trees agree in structure, shapes and dtypes."""
    if jax.tree.structure(expected) != jax.tree.structure(found):
        raise AssertionError(
            f"{what} changes its structure: {jax.tree.structure(expected)} became "
            f"{jax.tree.structure(found)}"
        )
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise AssertionError(
                f"{what} changes its type: {old.dtype}{[*old.shape]} at the start, "
                f"{new.dtype}{[*new.shape]} after a refresh"
            )


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
