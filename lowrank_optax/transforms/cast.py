"""``cast_moments``: storage dtypes of the moments of any inner optimizer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.leaves import moments as _moments
from lowrank_optax.leaves.boxes import is_box, refill, restore, unbox
from lowrank_optax.linalg.products import has_square, kept_if
from lowrank_optax.quantization import is_quantized


def cast_moments(
    inner: optax.GradientTransformation,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Stores the moments of ``inner`` in other dtypes than it computes in.

    Optax has ``mu_dtype`` for some optimizers and no ``nu_dtype``. Here the moments
    are cast to float32 before ``inner`` runs and back to their storage dtype after. A
    second moment that is not zero is not stored as zero, nor as infinity.

    Args:
      inner: any transformation whose states name their moments ``mu``, ``nu``,
        ``trace``, ``ema``.
      mu_dtype: storage dtype of ``mu``, ``trace`` and ``ema``, None to leave them.
      nu_dtype: storage dtype of ``nu``, None to leave it.

    Returns:
      The transformation, its state that of ``inner`` with other dtypes.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = lro.cast_moments(optax.scale_by_adam(), nu_dtype=jnp.bfloat16)
      >>> tx.init({"w": jnp.ones(2)}).nu["w"].dtype
      dtype(bfloat16)
    """
    inner = optax.with_extra_args_support(inner)
    first = dict.fromkeys(("mu", "trace", "ema"), mu_dtype)
    storage = {**first, "nu": nu_dtype}

    def cast(state: Any, dtype_of: Any) -> Any:
        moments = _moments.find(state)
        groups = tuple(
            {field: _cast_tree(tree, dtype_of(field)) for field, tree in group.items()}
            for group in moments.groups
        )
        return moments.rebuild(groups)

    def store(state: Any) -> Any:
        moments = _moments.find(state)
        groups = tuple(
            {
                field: _narrowed(tree, storage[field]) if field == "nu" else tree
                for field, tree in group.items()
            }
            for group in moments.groups
        )
        return cast(moments.rebuild(groups), storage.get)

    def load(state: Any) -> Any:
        # Only moments that are stored otherwise are cast; None leaves the others alone.
        return cast(state, lambda field: storage[field] and jnp.float32)

    def init(params: Any) -> Any:
        return store(inner.init(params))

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, load(state), params, **extra_args)
        return updates, store(state)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_dtypes(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the updates of ``inner`` in the gradients' dtypes, whatever its state's.

    Leaves without elements, of which Orbax would store no moments, are hidden from
    ``inner``.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(_with_elements(params))

    def update(updates, state, params=None, **extra_args):
        shown = _with_elements(updates), _with_elements(params)
        out, state = inner.update(shown[0], state, shown[1], **extra_args)
        return jax.tree.map(_returned, updates, out, is_leaf=is_box), state

    return optax.GradientTransformationExtraArgs(init, update)


def _with_elements(tree: Any) -> Any:
    def shown(leaf: Any) -> Any:
        # A MaskedNode is a tree without leaves, for which `inner` keeps no state.
        return leaf if math.prod(unbox(leaf).shape) else optax.MaskedNode()

    return jax.tree.map(shown, tree, is_leaf=is_box)


def _returned(gradient: Any, update: Any) -> Any:
    # Hidden, so without elements: the gradient can stand for its own update.
    if isinstance(update, optax.MaskedNode):
        return gradient
    wanted, found = unbox(gradient), unbox(update)
    floats = jnp.issubdtype(wanted.dtype, jnp.floating)
    return refill(update, found.astype(wanted.dtype)) if floats else update


def _narrowed(tree: Any, dtype: Any) -> Any:
    """Brings what is not zero into a narrower dtype's range: float16 ends at 6e-8.

    A second moment below would become zero, and Adam divide by eps alone; one above
    65504 an infinity that never decays.
    """
    if dtype is None or jnp.finfo(dtype).minexp <= jnp.finfo(jnp.float32).minexp:
        return tree
    info = jnp.finfo(dtype)
    least, most = (jnp.float32(x) for x in (info.smallest_subnormal, info.max))

    def narrowed(x: Any) -> Any:
        return x if is_quantized(x) else jnp.where(x > 0, jnp.clip(x, least, most), x)

    return jax.tree.map(narrowed, tree, is_leaf=is_quantized)


def _cast_tree(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree
    # What is encoded has its storage.
    return jax.tree.map(
        lambda x: x if is_quantized(x) else x.astype(dtype), tree, is_leaf=is_quantized
    )


def without_overflow(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Does for ``inner`` what a bracket does with numbers whose squares overflow.

    They are zeros to ``inner``, entry by entry, and take no step.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        # nnx.Optimizer gives a state back with mappings in the place of tuples.
        if _moments.are_altered(jax.tree.structure(updates, is_leaf=is_box), state):
            state = restore(state, lambda: inner.init(updates))
        sound = jax.tree.map(has_square, updates)
        shown = jax.tree.map(kept_if, sound, updates)
        out, new = inner.update(shown, state, params, **extra_args)
        return jax.tree.map(kept_if, sound, out), new

    return optax.GradientTransformationExtraArgs(inner.init, update)
