"""XLA's options for our programs, by platform and by the first jax that knows them: the one table.

They go with each program to its compilation, so they hold whatever the process had imported or set
before, and they are part of the persistent cache's key.
"""

import jax

# A step is one CUDA graph: everything that may be in one is. Collectives and loops are left out by
# default, and graphs of fewer than five kernels.
_COMMAND_BUFFERS = (
    "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,COLLECTIVES,WHILE"
)

Options = dict[str, str]

# platform -> (first version of jax, its options), ascending
_OPTIONS: dict[str, tuple[tuple[tuple[int, ...], Options], ...]] = {
    "cuda": (
        (
            (0, 11, 2),
            {
                "xla_gpu_enable_command_buffer": _COMMAND_BUFFERS,
                "xla_gpu_graph_min_graph_size": "1",
            },
        ),
    ),
}


def compiler_options(
    platform: str, jax_version: tuple[int, ...] = jax.__version_info__
) -> Options | None:
    """The options for programs of a platform (jax's name), None where there are none."""
    found = None
    for first, options in _OPTIONS.get("cuda" if platform == "gpu" else platform, ()):
        if jax_version >= first:
            found = options
    return found
