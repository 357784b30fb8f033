"""C++ kernels for CPUs, called through jax.ffi. Optional: without the library the jnp ops serve."""
