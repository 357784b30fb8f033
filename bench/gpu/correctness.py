"""What must be right before anything is fast: kernels, tiny checkpoints, answers beside others.

Oracles are independent: reference.py in float32, and the logits and tokens that another
implementation gave for the checkpoints of tests/reference.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ...engine.core import EngineCore
from ...engine.core_io import Submission
from ...engine.notices import say
from ...engine.sampling_params import SamplingParams
from ...engine.startup import Builder, NoBar
from ...layers.linear import DenseWeight, Norm
from ...layers.mesh import make_mesh
from ...layers.param import Kind, Param, Slice
from ...layers.quantization.registry import choose_format
from ...pallas_kernels import reference
from ...pallas_kernels.checks import AttentionSpec
from ...pallas_kernels.registry import choose
from .attention import Case, make_arrays, make_batch
from .model import kv_plan, make_builder, open_folder
from .results import Results

REFERENCE = Path(__file__).parent.parent.parent / "tests" / "reference"
FAMILIES = ("llama31_scaled_rope", "mistral_sliding", "qwen2", "qwen3", "yi_yarn")
ATTENTION = (
    Case(5, 1, 700),
    Case(5, 1, 700, dtype=jnp.bfloat16, page_size=16),
    Case(3, 1, 900, heads=28, kv_heads=4, page_size=32, window=200),
    Case(2, 1, 300, heads=16, kv_heads=4, head_dim=256, soft_cap=20.0),
    Case(3, 1, 300, heads=12, kv_heads=4, head_dim=96),
    Case(3, 130, 700),
    Case(2, 257, 257, dtype=jnp.bfloat16, head_dim=64),
    Case(2, 100, 500, heads=8, kv_heads=8, window=64, soft_cap=20.0),
    Case(2, 70, 300, heads=28, kv_heads=4, page_size=16),
)
# Of the largest result: rounding of q, p and the pages' dtype.
ATTENTION_ERROR = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-3}
F32_ERROR, BF16_MEAN, BF16_MOST = 2e-3, 0.01, 0.06
_GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def check(results: Results, platform: str = "cuda", families: Sequence[str] = FAMILIES) -> None:
    for case in ATTENTION:
        run = partial(check_attention, results, case, platform)
        results.section(f"correct {case.name}", run)
    for rows in (1, 5, 8, 33, 64):
        results.section(f"correct product[{rows}]", partial(check_product, results, rows, platform))
    for family in families:
        for dtype in ("float32", "bfloat16"):
            run = partial(check_family, results, family, dtype, platform)
            results.section(f"correct {family} {dtype}", run)
    results.section("same answer", partial(check_neighbours, results, platform))


def check_attention(results: Results, case: Case, platform: str) -> None:
    """The implementation that an engine takes, against float32 on the same numbers."""
    ops = choose(platform, dtype=jnp.bfloat16, shape=case.shape)
    batch = jax.tree.map(jnp.asarray, make_batch(case, ops.queries_per_item))
    spec = AttentionSpec(case.head_dim**-0.5, case.soft_cap)
    q, new, kv = make_arrays(case, is_real=True)

    @jax.jit
    def ours(q: jax.Array, kv: Any) -> jax.Array:
        step = ops.plan_attention(batch, case.page_size)
        return ops.attention.run(q, *new, kv, *step, spec, None)[0]

    @jax.jit
    def oracle(q: jax.Array, kv: Any) -> jax.Array:
        return reference.paged_attention(q, *new, kv, batch, None, spec)[0]

    with jax.default_matmul_precision("highest"):
        expected = np.asarray(oracle(q, kv), np.float64)
    error = np.abs(np.asarray(ours(q, kv), np.float64) - expected).max() / np.abs(expected).max()
    most = ATTENTION_ERROR[jnp.dtype(case.dtype).name]
    results.require(
        f"correct {case.name}", error, "of the largest", most=most, by=ops.attention.name
    )


def check_product(results: Results, rows: int, platform: str) -> None:
    """Plain with a residual, exact, and gated: all that the kernel does."""
    ops = choose(platform, dtype=jnp.bfloat16)
    weights = choose_format(np.dtype(jnp.bfloat16), ops)
    x = jax.random.normal(jax.random.key(2), (rows, 512), jnp.bfloat16).astype(jnp.float32)
    residual = jax.random.normal(jax.random.key(3), (rows, 1024), jnp.float32)
    norm, count = Norm(jnp.ones((512,), jnp.bfloat16), 1e-5), jnp.int32(rows)

    def matrix(out: int, width: int, seed: int, kind: Kind = Kind.LINEAR) -> tuple[Any, Any]:
        param = Param((out, width), (None, None), (Slice("w", "w", out),), kind)
        w = 0.05 * jax.random.normal(jax.random.key(seed), (out, width), jnp.bfloat16)
        return weights.wrap(param, w), DenseWeight(w)

    plain, gates, down = (
        matrix(1024, 512, 1),
        matrix(2048, 512, 4, Kind.GATED),
        matrix(512, 1024, 5),
    )
    cases = {
        "residual": lambda i: plain[i].product(x, None, residual=residual),
        "exact": lambda i: plain[i].exact_product(x, None, norm, count),
        "gated": lambda i: gates[i].gated_mlp(x, None, norm, down[i], None, count, None),
    }
    for name, run in cases.items():
        with jax.default_matmul_precision("highest"):
            expected = np.asarray(jax.jit(run, static_argnums=0)(1))
        error = np.abs(np.asarray(jax.jit(run, static_argnums=0)(0)) - expected).max()
        share = error / np.abs(expected).max()
        # The gated inner row is rounded to bfloat16: sums in another order round some differently.
        most = 4e-3 if name == "gated" else 1e-5
        results.require(
            f"correct product[{name},{rows}]", share, "of the largest", most=most,
            by=ops.linear.name,
        )  # fmt: skip


def check_family(results: Results, family: str, dtype: str, platform: str) -> None:
    """Logits of every position, and greedy tokens while the reference is sure of them."""
    data = load_file(REFERENCE / family / "reference.safetensors")
    folder, mesh = REFERENCE / family, make_mesh(1)
    builder = open_folder(folder, mesh, platform, jnp.dtype(dtype), max_logprobs=-1)
    core = ready_core(builder, 400, 512)
    scored = replace(_GREEDY, max_tokens=1, prompt_logprobs=-1)
    prompts = [data[f"prompt_{i}"].tolist() for i in range(4)]
    outputs = answer(core, prompts[:2], scored)
    errors = []
    for i, parts in enumerate(outputs):
        got = np.array([p.top for p in parts[0].prompt_logprobs or ()])
        logits = data[f"logits_{i}"][:-1]
        shifted = logits - logits.max(-1, keepdims=True)
        expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        errors.append(np.abs(got - expected).ravel())
    error = np.concatenate(errors)
    name = f"correct {family} {dtype} logits"
    if dtype == "float32":
        results.require(f"{name}, largest error", float(error.max()), "", most=F32_ERROR)
        same = 0
        for i, parts in enumerate(answer(core, prompts, _GREEDY)):
            tokens = [t for part in parts for t in part.token_ids]
            margins = data[f"greedy_margin_{i}"]
            sure = int(np.argmin(margins > 1e-2)) if (margins <= 1e-2).any() else len(margins)
            if tokens[:sure] != data[f"greedy_{i}"].tolist()[:sure]:
                raise AssertionError(f"prompt {i} went another way within {sure} sure steps")
            same += sure
        results.add(f"correct {family} greedy tokens", same, "compared")
    else:
        spread = data["logits_1"].std()
        results.require(f"{name}, mean error", float(error.mean() / spread), "std", most=BF16_MEAN)
        results.require(
            f"{name}, largest error", float(error.max() / spread), "std", most=BF16_MOST
        )
    core.runner.release()


def check_neighbours(results: Results, platform: str) -> None:
    """How often a token is another one because of who shares the batch: published, not bounded."""
    options = {"kv_cache_memory_bytes": None, "enable_prefix_caching": False}
    builder = make_builder("1b", make_mesh(1), num_layers=2, platform=platform, **options)
    core = ready_core(builder, 600, 1024)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 1000, int(n)).tolist() for n in rng.integers(1, 200, 32)]
    together = answer(core, prompts, _GREEDY)
    num_same = 0
    for prompt, beside in zip(prompts, together, strict=True):
        [alone] = answer(core, [prompt], _GREEDY)
        pairs = zip(alone, beside, strict=True)
        num_same += all(a.token_ids == b.token_ids for a, b in pairs)
    share = num_same / len(prompts)
    results.add("answers that do not depend on their batch", share, "of 1", prompts=len(prompts))
    core.runner.release()


def ready_core(builder: Builder, num_pages: int, max_model_len: int) -> EngineCore:
    """Lazy: what is not asked for is not compiled."""
    plan = kv_plan(num_pages, max_model_len, builder.sizes.page_size)
    runner = builder.runner(plan)
    runner.set_weights(builder.weights(NoBar, None, say).tree)
    runner.allocate()
    return EngineCore(runner, builder.scheduler(plan, b"s" * 32), eos_ids=frozenset())


def answer(core: EngineCore, prompts: list[list[int]], params: SamplingParams) -> list[list[Any]]:
    """The outputs of each prompt, step by step."""
    for i, prompt in enumerate(prompts):
        core.submit(Submission(f"r{i}", tuple(prompt), params, seed=i))
    made: list[list[Any]] = [[] for _ in prompts]
    while core.has_work:
        for output in core.step():
            if output.finish_reason == "error":
                raise RuntimeError(f"{output.request_id} ended: {output.stop_reason}")
            made[int(output.request_id[1:])].append(output)
    return made
