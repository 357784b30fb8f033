"""Which implementation of each op runs on which platform: the first of an op's list that serves it.

`choose` is called once at start; its answer is logged, printed by `quire env`, and handed to the
layers as an argument. To add a kernel: one file, one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from . import attention_jnp, reference
from .checks import (
    AttentionBatch,
    AttentionSpec,
    KVPages,
    PlannedBatch,
    check_paged_attention,
)

PagedAttention = Callable[..., tuple[jax.Array, KVPages]]


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `platforms` are jax's names; the first listed that fits is taken."""

    name: str
    platforms: tuple[str, ...]
    run: PagedAttention
    plan: Callable[[AttentionBatch, int], Any] = lambda batch, page_size: None


PAGED_ATTENTION = (
    Implementation("jnp", ("cpu", "cuda"), attention_jnp.paged_attention, attention_jnp.plan),
    Implementation("reference", ("cpu", "cuda"), reference.paged_attention),
)


@dataclass(frozen=True)
class Ops:
    """The chosen implementation of every op. Hashable: a static argument of the layers."""

    attention: Implementation

    def plan_attention(self, batch: AttentionBatch, page_size: int) -> PlannedBatch:
        """What the layers' calls have in common, computed once a step."""
        return PlannedBatch(batch, self.attention.plan(batch, page_size))

    def paged_attention(
        self,
        q: jax.Array,  # [tokens, heads, head_dim]
        k_new: jax.Array,  # [tokens, kv_heads, head_dim]
        v_new: jax.Array | None,  # [tokens, kv_heads, value_dim]
        kv: KVPages,
        step: PlannedBatch,
        spec: AttentionSpec,
        sinks: jax.Array | None = None,  # f32[heads]
    ) -> tuple[jax.Array, KVPages]:
        """reference.paged_attention by the chosen implementation, its contract checked."""
        check_paged_attention(q, k_new, v_new, kv, step.batch, spec, sinks)
        return self.attention.run(q, k_new, v_new, kv, *step, spec, sinks)

    def names(self) -> dict[str, str]:
        """Op name -> implementation name, for the log and `quire env`."""
        return {"paged_attention": self.attention.name}


def choose(platform: str, *, attention: str | None = None) -> Ops:
    """The ops for a platform; `attention` picks an implementation by name (tests, debugging).

    Raises LookupError naming what there is.
    """
    fitting = [
        i for i in PAGED_ATTENTION if platform in i.platforms and attention in (None, i.name)
    ]
    if not fitting:
        known = ", ".join(f"{i.name} ({'/'.join(i.platforms)})" for i in PAGED_ATTENTION)
        raise LookupError(
            f"no paged_attention named {attention!r} for {platform!r}; there are {known}"
        )
    return Ops(fitting[0])
