"""Ops: what each one means, its contract, and its implementations. Imports jax only."""
