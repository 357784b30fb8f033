"""Which implementation of each op runs on which platform: the first of an op's list that serves it.

`choose` is called once at start; its answer is logged, printed by `quire env`, and handed to the
layers as an argument. To add a kernel: one file, one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..cpu_kernels import ops
from ..cpu_kernels.library import Library, Missing
from ..cpu_kernels.library import load as cpu_library
from . import attention_cpu, attention_gpu, attention_jnp, reference
from .checks import (
    QUERIES_PER_ITEM,
    AttentionBatch,
    AttentionShape,
    AttentionSpec,
    KVPages,
    PlannedBatch,
    check_attend,
)
from .heads import HeadNorms, split_heads

__all__ = ["Library", "Missing", "Ops", "choose", "cpu_library"]

PagedAttention = Callable[..., tuple[jax.Array, KVPages]]


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `platforms` are jax's names; the first listed that fits is taken.

    attend: all of Ops.attend in one call, where there is such a kernel. serves: None where every
    shape is served. queries_per_item: the largest work item it takes. is_for_tests: taken only by
    name.
    """

    name: str
    platforms: tuple[str, ...]
    run: PagedAttention
    plan: Callable[[AttentionBatch, int, int], Any] = lambda batch, page_size, group: None
    attend: PagedAttention | None = None
    needs_library: bool = False
    serves: Callable[[AttentionShape], bool] | None = None
    queries_per_item: Callable[[AttentionShape], int] = lambda shape: QUERIES_PER_ITEM
    is_for_tests: bool = False


def _mosaic(name: str, platform: str, kernels: attention_gpu.Kernels) -> Implementation:
    return Implementation(
        name,
        (platform,),
        kernels.run,
        kernels.plan,
        serves=kernels.serves,
        queries_per_item=kernels.queries_per_item,
        is_for_tests=kernels.is_interpreted,
    )


PAGED_ATTENTION = (
    _mosaic("mosaic", "cuda", attention_gpu.HOPPER),
    Implementation(
        "native",
        ("cpu",),
        attention_cpu.paged_attention,
        attend=attention_cpu.attend,
        needs_library=True,
    ),
    Implementation("jnp", ("cpu", "cuda"), attention_jnp.paged_attention, attention_jnp.plan),
    Implementation("reference", ("cpu", "cuda"), reference.paged_attention),
    _mosaic("mosaic-interpreted", "cpu", attention_gpu.INTERPRETED),
)
# Dtypes of weights that the C++ kernels multiply.
NATIVE_LINEAR_DTYPES = (jnp.bfloat16, jnp.float32)


@dataclass(frozen=True)
class Ops:
    """The chosen implementation of every op. Hashable: a static argument of the layers.

    linear: "native", weights are packed for the C++ kernels, or "xla", they are kept as they are.
    """

    attention: Implementation
    linear: str = "xla"
    queries_per_item: int = QUERIES_PER_ITEM
    group: int = 1  # query heads of a kv head, if the model is known

    @property
    def is_padding_free(self) -> bool:
        """Whether padded tokens are skipped, not computed and dropped."""
        return self.linear == "native" and self.attention.name == "native"

    def plan_attention(self, batch: AttentionBatch, page_size: int) -> PlannedBatch:
        """What the layers' calls have in common, computed once a step."""
        return PlannedBatch(batch, self.attention.plan(batch, page_size, self.group))

    def attend(
        self,
        qkv: jax.Array,  # [tokens, (heads + kv_heads) * head_dim + kv_heads * value_dim]
        kv: KVPages,
        step: PlannedBatch,
        spec: AttentionSpec,
        tables: tuple[jax.Array, jax.Array] | None = None,
        norms: HeadNorms | None = None,
    ) -> tuple[jax.Array, KVPages]:
        """split_heads, then reference.paged_attention, by the chosen implementation:
        [tokens, heads * value_dim] and the cache. The contract is checked.
        """
        _, kv_heads, _, head_dim = kv.k.shape
        check_attend(qkv, kv, step.batch, spec)
        if self.attention.attend is not None:
            return self.attention.attend(qkv, kv, *step, spec, tables, norms, None)
        heads = split_heads(qkv, kv_heads, head_dim, tables, norms, spec.norm_epsilon)
        out, kv = self.attention.run(*heads, kv, *step, spec, None)
        return out.reshape(out.shape[0], -1), kv

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """For the KV cache."""
        is_native = self.attention.needs_library
        return ops.zeros(shape, dtype) if is_native else jnp.zeros(shape, dtype)

    def names(self) -> dict[str, str]:
        """Op name -> implementation name, for the log and `quire env`."""
        return {"paged_attention": self.attention.name, "linear": self.linear}


def choose(
    platform: str,
    *,
    attention: str | None = None,
    dtype: Any = jnp.float32,
    shape: AttentionShape | None = None,
) -> Ops:
    """The ops for a platform, weights of `dtype` and a model's attention; without its shape only
    those that serve every shape. `attention` picks an implementation by name (tests, debugging).

    Raises LookupError naming what there is.
    """
    has_library = platform == "cpu" and isinstance(cpu_library(), Library)
    fitting = [
        i
        for i in PAGED_ATTENTION
        if platform in i.platforms
        and (attention == i.name if attention else not i.is_for_tests)
        and (has_library or not i.needs_library)
        and (i.serves is None or (shape is not None and i.serves(shape)))
    ]
    if not fitting:
        known = ", ".join(f"{i.name} ({'/'.join(i.platforms)})" for i in PAGED_ATTENTION)
        served = "" if shape is None else f" that serves {shape}"
        raise LookupError(
            f"no paged_attention named {attention!r} for {platform!r}{served}; there are {known}"
        )
    is_native = has_library and jnp.dtype(dtype) in [jnp.dtype(d) for d in NATIVE_LINEAR_DTYPES]
    chosen, linear = fitting[0], "native" if is_native else "xla"
    if shape is None:
        return Ops(chosen, linear)
    return Ops(chosen, linear, chosen.queries_per_item(shape), shape.heads // shape.kv_heads)
