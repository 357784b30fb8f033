"""What `quire env` prints: the facts that decide how quire runs here, for a bug report."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp

from .. import __version__
from ..engine.compiler import default_cache_dir
from ..engine.errors import ConfigError
from ..engine.memory import format_bytes, host_memory
from ..engine.processors import describe_kernels
from ..pallas_kernels.checks import AttentionShape
from ..pallas_kernels.registry import choose, cpu_library

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy", "tokenizers",
    "transformers", "safetensors", "orbax-checkpoint", "grpcio", "protobuf",
)  # fmt: skip

# Of most models; `quire serve` says what its own model gets.
_COMMON = AttentionShape(
    heads=32, kv_heads=8, head_dim=128, value_dim=128, page_size=64, kv_dtype=jnp.float16
)


def describe() -> dict[str, str]:
    """Name -> value, in the order to print."""
    devices = jax.devices()
    backend = jax.default_backend()
    memory = host_memory()
    try:
        name = "cuda" if backend == "gpu" else backend
        ops = choose(name, dtype=jnp.bfloat16, shape=_COMMON).names()
    except LookupError as error:
        raise ConfigError(str(error)) from error
    return {
        "quire": __version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version_of(name) for name in _PACKAGES if _version_of(name) != "not installed"},
        "devices": f"{len(devices)} x {devices[0].device_kind} ({backend})",
        "processors": str(len(os.sched_getaffinity(0))),
        "memory": f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}",
        **{f"op {op}": name for op, name in ops.items()},
        "cpu kernels": describe_kernels(cpu_library(), None).line,
        "compile cache": str(default_cache_dir()),
        "hub cache": os.environ.get("HF_HUB_CACHE", os.environ.get("HF_HOME", "the hub's default")),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
