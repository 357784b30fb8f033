"""What the device itself can do: the ceilings that other figures are quoted against."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .results import Results
from .timing import Bench

_COPY_BYTES = 4 << 30
_SIDE = 8192


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes read and written; read: bytes read; matmul: bfloat16, f32 sums."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: float


# Of an H200, for times on paper: its copy bandwidth was measured, its products were not.
PAPER = Ceilings(4.3e12, 4.3e12, 800e12)


def measure(bench: Bench, results: Results, *, scale: int = 1) -> Ceilings:
    """scale: divides every size, to try the code on a small machine."""
    size = _COPY_BYTES // scale // 4

    def ones(shape: tuple[int, ...], dtype: Any) -> Any:
        """Anew each time: what is carried is donated."""
        return jnp.ones(shape, dtype) if bench.measured else jax.ShapeDtypeStruct(shape, dtype)

    copied = bench.seconds(lambda x, _: x + 1, ones((size,), jnp.float32), ())
    copy_rate = copied.rate(2 * 4 * size)
    results.add("copy_bandwidth", _giga(copy_rate), "GB/s", bytes=2 * 4 * size, **copied.facts())

    read = bench.seconds(
        lambda s, x: s + (x + s).sum() * 1e-30, ones((), jnp.float32), ones((size,), jnp.float32)
    )
    read_rate = read.rate(4 * size)
    results.add("read_bandwidth", _giga(read_rate), "GB/s", bytes=4 * size, **read.facts())

    side = _SIDE // scale

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        product = lax.dot(a, b, preferred_element_type=jnp.float32)
        return (product / side).astype(jnp.bfloat16)

    matmul = bench.seconds(
        multiply, ones((side, side), jnp.bfloat16), ones((side, side), jnp.bfloat16)
    )
    flops = matmul.rate(2 * side**3)
    results.add("matmul_bf16", _giga(flops), "GFLOP/s", side=side, **matmul.facts())
    return Ceilings(
        copy_rate or PAPER.copy_bytes_per_s,
        read_rate or PAPER.read_bytes_per_s,
        flops or PAPER.matmul_flops_per_s,
    )


def _giga(rate: float | None) -> float | None:
    return None if rate is None else rate / 1e9
