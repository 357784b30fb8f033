"""Everything here compiles for an H200 that is not there: `make check-gpu-compile`."""

from quire.bench.gpu import deviceless

# Raises, and so fails all of them, where a part of the compiler is missing. Before jax is imported.
deviceless.prepare()
