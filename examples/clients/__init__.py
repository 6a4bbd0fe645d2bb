"""`lowrank_optax` in other people's training loops: one short file for each."""
