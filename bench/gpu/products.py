"""Products with weights at the row counts of decoding: bytes of the weights over time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...layers.linear import DenseWeight, Matrix
from ...layers.param import Kind, Param, Slice
from ...layers.quantization.registry import choose_format
from ...pallas_kernels.registry import choose
from .ceilings import Ceilings
from .results import Results
from .timing import Bench, Timed

# (out, in) of an 8B llama: q, k and v; attention's output; gates and ups; down; head
SHAPES = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 8, 32, 64)
# So many of a kind, one after the other, do not stay in the cache.
_LEAST_BYTES = 256 << 20


def measure(bench: Bench, results: Results, ceilings: Ceilings) -> None:
    for name, shape in SHAPES.items():
        for rows in ROWS:
            run = partial(_measure, name, shape, rows, bench, results, ceilings)
            results.section(f"product[{name},{rows}]", run)


def _measure(
    name: str,
    shape: tuple[int, int],
    rows: int,
    bench: Bench,
    results: Results,
    ceilings: Ceilings,
) -> None:
    platform = "cpu" if bench.target.platform == "cpu" else "cuda"
    ops = choose(platform, dtype=jnp.bfloat16)
    weights = choose_format(jnp.dtype(jnp.bfloat16), ops)
    param = Param(shape, (None, None), (Slice(name, name, shape[0]),), Kind.LINEAR)
    wrap = partial(weights.wrap, param) if platform == "cuda" else DenseWeight
    ours = _time(wrap, shape, rows, bench)
    size = 2 * shape[0] * shape[1]
    rate = ours.rate(size)
    results.add(
        f"product[{name},{rows}] share of copy bandwidth",
        None if rate is None else rate / ceilings.copy_bytes_per_s,
        "of 1",
        by=ops.linear.name,
        us=None if ours.seconds is None else ours.seconds * 1e6,
        bytes=size,
        **ours.facts(),
    )
    if bench.measured:
        xla = _time(DenseWeight, shape, rows, bench)
        assert xla.seconds is not None
        assert ours.seconds is not None
        ahead = xla.seconds / ours.seconds
        results.add(f"product[{name},{rows}] ahead of XLA", ahead, "times", us=xla.seconds * 1e6)


def _time(wrap: Any, shape: tuple[int, int], rows: int, bench: Bench) -> Timed:
    """Of one product, among as many weights as do not stay in the cache."""
    count = max(2, -(-_LEAST_BYTES // (2 * shape[0] * shape[1])))
    if bench.measured:
        arrays = [
            0.02 * jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(count)
        ]
        x: Any = jnp.ones((rows, shape[1]), jnp.float32)
    else:
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * count
        x = jax.ShapeDtypeStruct((rows, shape[1]), jnp.float32)

    def multiply(x: jax.Array, arrays: list[jax.Array]) -> jax.Array:
        for array in arrays:
            matrix: Matrix = wrap(array)
            x = x + matrix.product(x, None)[:, :1] * 1e-6
        return x

    timed = bench.seconds(multiply, x, arrays)
    return Timed(None if timed.seconds is None else timed.seconds / count, timed.program)
