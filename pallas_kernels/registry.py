"""Which implementation of each op runs on which platform: the first of an op's list that serves it.

`choose` is called once at start; its answer is logged, printed by `quire env`, and handed to the
layers as an argument. To add a kernel: one file, one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..cpu_kernels import ops
from ..cpu_kernels.library import Library, Missing
from ..cpu_kernels.library import load as cpu_library
from . import attention_cpu, attention_gpu, attention_jnp, linear_gpu, reference, tuning
from .checks import (
    QUERIES_PER_ITEM,
    AttentionBatch,
    AttentionShape,
    AttentionSpec,
    ContractError,
    KVPages,
    LayerPages,
    Pages,
    PlannedBatch,
    check_attend,
)
from .heads import HeadNorms, split_heads

__all__ = ["Library", "Missing", "Ops", "choose", "cpu_library"]

PagedAttention = Callable[..., tuple[jax.Array, Any]]  # the cache in the type it came in


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `platforms` are jax's names; the first listed that fits is taken.

    attend: all of Ops.attend in one call, where there is such a kernel. stacks_layers: that takes
    LayerPages, and no KVPages. serves: None where every shape is served. queries_per_item: the
    largest work item it takes. only_by_name: never taken by itself.
    """

    name: str
    platforms: tuple[str, ...]
    run: PagedAttention
    plan: Callable[[AttentionBatch, int, int], Any] = lambda batch, page_size, group: None
    attend: PagedAttention | None = None
    stacks_layers: bool = False
    needs_library: bool = False
    serves: Callable[[AttentionShape], bool] | None = None
    queries_per_item: Callable[[AttentionShape], int] = lambda shape: QUERIES_PER_ITEM
    only_by_name: bool = False


def _mosaic(name: str, platform: str, kernels: attention_gpu.Kernels) -> Implementation:
    return Implementation(
        name,
        (platform,),
        kernels.run,
        kernels.plan,
        kernels.attend,
        serves=kernels.serves,
        queries_per_item=kernels.queries_per_item,
        only_by_name=kernels.is_interpreted,
    )


PAGED_ATTENTION = (
    _mosaic("mosaic", "cuda", attention_gpu.HOPPER),
    Implementation(
        "native",
        ("cpu",),
        attention_cpu.paged_attention,
        attend=attention_cpu.attend,
        stacks_layers=True,
        needs_library=True,
    ),
    Implementation("jnp", ("cpu", "cuda"), attention_jnp.paged_attention, attention_jnp.plan),
    Implementation("reference", ("cpu", "cuda"), reference.paged_attention),
    _mosaic("mosaic-interpreted", "cpu", attention_gpu.INTERPRETED),
)


@dataclass(frozen=True)
class Linear:
    """What multiplies with weights; the first listed that fits is taken.

    dtypes: of the weights; None: all. kernel: of few tokens, where the form of the weights is that
    of checkpoints; None: there is none, or the name says more. only_by_name: never taken by itself.
    """

    name: str
    platforms: tuple[str, ...]
    dtypes: tuple[Any, ...] | None = None
    kernel: linear_gpu.Kernel | None = None
    needs_library: bool = False
    only_by_name: bool = False

    def fits(self, platform: str, name: str | None, dtype: Any, *, has_library: bool) -> bool:
        return (
            platform in self.platforms
            and (name == self.name or (name is None and not self.only_by_name))
            and (self.dtypes is None or jnp.dtype(dtype) in [jnp.dtype(d) for d in self.dtypes])
            and (has_library or not self.needs_library)
        )


_SIZES = tuning.load("h200")
LINEAR = (
    Linear("native", ("cpu",), (jnp.bfloat16, jnp.float32), needs_library=True),
    Linear("mosaic", ("cuda",), linear_gpu.DTYPES, linear_gpu.Kernel(_SIZES)),
    Linear("xla", ("cpu", "cuda")),
    Linear(
        "mosaic-interpreted",
        ("cpu",),
        linear_gpu.DTYPES,
        linear_gpu.Kernel(_SIZES, is_interpreted=True),
        only_by_name=True,
    ),
)


@dataclass(frozen=True)
class Ops:
    """The chosen implementation of every op. Hashable: a static argument of the layers."""

    attention: Implementation
    linear: Linear
    queries_per_item: int = QUERIES_PER_ITEM
    group: int = 1  # query heads of a kv head, if the model is known
    dtype: Any = None  # of the weights, to which the output of attention is rounded by who reads it

    @property
    def is_padding_free(self) -> bool:
        """Whether padded tokens are skipped, not computed and dropped."""
        return self.linear.name == "native" and self.attention.name == "native"

    @property
    def stacks_layers(self) -> bool:
        """Whether attend takes LayerPages, and no KVPages."""
        return self.attention.stacks_layers

    def plan_attention(self, batch: AttentionBatch, page_size: int) -> PlannedBatch:
        """What the layers' calls have in common, computed once a step."""
        return PlannedBatch(batch, self.attention.plan(batch, page_size, self.group))

    def attend(
        self,
        qkv: jax.Array,  # [tokens, (heads + kv_heads) * head_dim + kv_heads * value_dim]
        kv: Pages,
        step: PlannedBatch,
        spec: AttentionSpec,
        tables: tuple[jax.Array, jax.Array] | None = None,
        norms: HeadNorms | None = None,
    ) -> tuple[jax.Array, Pages]:
        """split_heads, then reference.paged_attention, by the chosen implementation:
        [tokens, heads * value_dim] and the cache. The contract is checked.
        """
        kv_heads, _, head_dim = kv.k.shape[-3:]
        check_attend(qkv, kv, step.batch, spec)
        wanted = LayerPages if self.stacks_layers else KVPages
        if not isinstance(kv, wanted):
            raise ContractError(f"{self.attention.name} takes {wanted.__name__}, got {type(kv)}")
        if self.attention.attend is not None:
            spec = replace(spec, read_as=self.dtype)
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
        return {"paged_attention": self.attention.name, "linear": self.linear.name}


def choose(
    platform: str,
    *,
    attention: str | None = None,
    linear: str | None = None,
    dtype: Any = jnp.float32,
    shape: AttentionShape | None = None,
) -> Ops:
    """The ops for a platform, weights of `dtype` and a model's attention; without its shape only
    those that serve every shape. `attention` and `linear` pick an implementation by name (tests,
    debugging).

    Raises LookupError naming what there is.
    """
    has_library = platform == "cpu" and isinstance(cpu_library(), Library)
    fitting = [
        i
        for i in PAGED_ATTENTION
        if platform in i.platforms
        and (attention == i.name if attention else not i.only_by_name)
        and (has_library or not i.needs_library)
        and (i.serves is None or (shape is not None and i.serves(shape)))
    ]
    if not fitting:
        known = ", ".join(f"{i.name} ({'/'.join(i.platforms)})" for i in PAGED_ATTENTION)
        served = "" if shape is None else f" that serves {shape}"
        raise LookupError(
            f"no paged_attention named {attention!r} for {platform!r}{served}; there are {known}"
        )
    products = [i for i in LINEAR if i.fits(platform, linear, dtype, has_library=has_library)]
    if not products:
        known = ", ".join(f"{i.name} ({'/'.join(i.platforms)})" for i in LINEAR)
        raise LookupError(
            f"no linear named {linear!r} for {platform!r} and {jnp.dtype(dtype)} weights; there "
            f"are {known}"
        )
    chosen, product = fitting[0], products[0]
    if shape is None:
        return Ops(chosen, product)
    group = shape.heads // shape.kv_heads
    return Ops(chosen, product, chosen.queries_per_item(shape), group, jnp.dtype(dtype))
