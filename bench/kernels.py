"""Where the time of a decode step goes on CPU: each kernel alone, then the whole step.

python -m quire.bench.kernels [--size 135m] [--rows 1,32] [--context 128]

Each kernel runs once for each layer on that layer's own weights and pages, so that they come from
memory as they do in a step. What the step takes beyond their sum is XLA's part and the host's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from quire.cpu_kernels import ops
from quire.cpu_kernels.library import Library, load
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore, Submission
from quire.engine.model_source import DEMO_FOLDER
from quire.engine.processors import describe_kernels
from quire.engine.sampling_params import SamplingParams
from quire.engine.startup import start_engine
from quire.pallas_kernels.checks import QUERIES_PER_ITEM

from .report import emit, line

BF16 = np.dtype(ml_dtypes.bfloat16)
RUNS, PAGE_SIZE, NUM_STEPS = 9, 16, 60

Batch = tuple[np.ndarray, ...]  # the arrays of an AttentionBatch, in its order
NUM_SINGLE = 6  # where the number of lone queries is among them


def config_of(size: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (Path(__file__).parent / "shapes" / size / "config.json").read_text(encoding="utf-8")
    )
    return config


def weights(shape: ops.Shape, layers: int) -> list[jax.Array]:
    """Packed forms of noise; the same values in each, in memory of their own."""
    noise = np.random.default_rng(0).standard_normal(shape.packed, np.float32).astype(BF16) * 0.02
    return [jnp.array(noise.astype(BF16)) for _ in range(layers)]


def median_s(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def after(count: jax.Array, made: jax.Array) -> jax.Array:
    """The same count for one who waits for what was made, as each layer does for the one before: by
    a number, so that nothing is computed but the kernels.
    """
    return count + (0.0 * made[0, 0]).astype(jnp.int32)


def linear_s(rows: int, out: int, width: int, layers: int, *, is_exact: bool) -> float:
    x = jnp.ones((rows, width), jnp.float32)
    many = weights(ops.Shape(out, width), layers)

    @jax.jit
    def run(x: jax.Array, many: list[jax.Array]) -> jax.Array:
        count = jnp.int32(rows)
        for weight in many:
            count = after(count, ops.linear(x, weight, out, is_exact=is_exact, count=count))
        return count

    return median_s(lambda: run(x, many))


def mlp_s(rows: int, hidden: int, inner: int, layers: int) -> float:
    x, norm = jnp.ones((rows, hidden), jnp.float32), jnp.ones((hidden,), BF16)
    gate_ups = weights(ops.Shape(2 * inner, hidden, is_gated=True), layers)
    downs = weights(ops.Shape(hidden, inner), layers)

    @jax.jit
    def run(x: jax.Array, gate_ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
        for gate_up, down in zip(gate_ups, downs, strict=True):
            x = ops.mlp(x, norm, 1e-5, gate_up, None, down, None, inner)
        return x

    return median_s(lambda: run(x, gate_ups, downs))


def decode_batch(rows: int, context: int) -> Batch:
    """Every row's token at the end of its context."""
    width = -(-context // PAGE_SIZE)
    table = 1 + np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    last = np.full(rows, context - 1, np.int32)
    none = np.zeros(0, np.int32)
    return (
        np.zeros(rows, np.int32), last + 1, np.arange(rows, dtype=np.int32),
        table[:, last[0] // PAGE_SIZE], last % PAGE_SIZE, table, np.int32(rows), np.int32(0),
        none, none, none,
    )  # fmt: skip


def prompt_batch(tokens: int) -> Batch:
    """One prompt, in items of as many queries as the engine makes them."""
    table = 1 + np.arange(-(-tokens // PAGE_SIZE), dtype=np.int32)[None]
    at = np.arange(tokens, dtype=np.int32)
    first = np.arange(0, tokens, QUERIES_PER_ITEM, dtype=np.int32)
    return (
        0 * at, at + 1, 0 * at, table[0, at // PAGE_SIZE], at % PAGE_SIZE, table, np.int32(0),
        np.int32(len(first)), 0 * first, first, np.minimum(QUERIES_PER_ITEM, tokens - first),
    )  # fmt: skip


def attention_s(batch: Batch, config: dict[str, Any], layers: int) -> float:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    tokens, table = batch[0].shape[0], batch[5]
    pages = (layers, table.size + 1, kv_heads, PAGE_SIZE, dim)
    make = jax.jit(lambda: ops.zeros(pages, jnp.float16))  # in huge pages, as the engine has them
    cache = make(), make()
    qkv = jnp.ones((tokens, (heads + 2 * kv_heads) * dim), jnp.float32)
    tables = (jnp.ones((tokens, dim), jnp.float32), jnp.zeros((tokens, dim), jnp.float32))

    def step(qkv: jax.Array, cache: tuple[jax.Array, jax.Array]) -> Any:
        k, v = cache
        arrays = list(map(jnp.asarray, batch))
        for layer in range(layers):
            out, k, v = ops.attention(
                qkv, k, v, jnp.int32(layer), tuple(arrays), heads=heads, value_dim=dim,
                scale=dim**-0.5, soft_cap=None, sinks=None, tables=tables, norms=None, epsilon=0.0,
            )  # fmt: skip
            arrays[NUM_SINGLE] = after(arrays[NUM_SINGLE], out)
        return arrays[NUM_SINGLE], (k, v)

    run = jax.jit(step, donate_argnums=1)
    _, cache = run(qkv, cache)
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        result, cache = run(qkv, cache)
        jax.block_until_ready(result)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def head_s(rows: int, config: dict[str, Any]) -> float:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    x = jnp.ones((rows, hidden), jnp.float32)
    # Several, or the next run would find it in the cache.
    many = weights(ops.Shape(vocab, hidden), 4)
    run = jax.jit(lambda x, many: [ops.head_argmax(x, weight, vocab) for weight in many])
    return median_s(lambda: run(x, many)) / len(many)


def engine_of(size: str) -> EngineCore:
    folder = Path(__file__).parent / "shapes" / size
    config = EngineConfig(
        model=str(folder), tokenizer=str(DEMO_FOLDER), load_format="dummy", dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
    )  # fmt: skip
    return start_engine(config, lambda _: None).core


def step_s(size: str, rows: int, context: int) -> float:
    """One step of a running engine, with what of the host's work is not hidden."""
    core = engine_of(size)
    # Around the context, so that the middle of what is measured is at it.
    before = context - NUM_STEPS // 2
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS + 20, ignore_eos=True)
    for i in range(rows):
        core.submit(Submission(str(i), tuple(range(10, 10 + before)), params, seed=i))
    while len(core.scheduler.running) < rows or core.scheduler.running[-1].num_output < 5:
        core.step()
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        core.step()
    return (time.perf_counter() - started) / NUM_STEPS


def prompt_s(size: str, tokens: int) -> float:
    """From a prompt's submission to its one token."""
    core = engine_of(size)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def run() -> None:
        core.submit(Submission("0", tuple(range(10, 10 + tokens)), params, seed=0))
        while core.has_work:
            core.step()

    return median_s(run)


def emit_parts(kind: str, rows: int, batch: Batch, whole: float, args: argparse.Namespace) -> None:
    """Of a step of so many rows, of which the head sees one for each request."""
    config = config_of(args.size)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    parts = {
        "q, k and v": linear_s(rows, hidden + 2 * kv, hidden, layers, is_exact=True),
        "attention": attention_s(batch, config, layers),
        "attention's output": linear_s(rows, hidden, hidden, layers, is_exact=False),
        "gated layer": mlp_s(rows, hidden, config["intermediate_size"], layers),
        "head": head_s(batch[5].shape[0], config),
    }
    parts["the rest"] = whole - sum(parts.values())
    parts["step"] = whole
    for name, seconds in parts.items():
        title = f"{kind}_{args.size}_{rows} {name}"
        emit(line(title, seconds * 1e3, "ms", None, context=args.context))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="135m")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompts", default="512")
    args = parser.parse_args()
    library = load()
    if not isinstance(library, Library):
        raise SystemExit(f"there are no CPU kernels: {library.reason}")
    describe_kernels(library, None).use()
    for rows in map(int, filter(None, args.rows.split(","))):
        whole = step_s(args.size, rows, args.context)
        emit_parts("decode", rows, decode_batch(rows, args.context), whole, args)
    for tokens in map(int, filter(None, args.prompts.split(","))):
        emit_parts("prompt", tokens, prompt_batch(tokens), prompt_s(args.size, tokens), args)


if __name__ == "__main__":
    main()
