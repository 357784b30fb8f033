"""How another process talks to the core, without JAX."""
