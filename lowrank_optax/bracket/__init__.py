"""The bracket: one step of an Optax transformation inside a subspace."""
