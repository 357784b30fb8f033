"""Llama (Touvron et al. 2023) and the decoders that differ from it by a few switches.

Pre-norm blocks of grouped-query attention with rope and a gated MLP. Mistral adds a sliding window,
Qwen2 biases on q, k and v, Qwen3 a norm on each head of q and k: see their files, which read their
config into the same spec.
"""

from dataclasses import dataclass
from typing import Any

import jax

from ...pallas_kernels.checks import AttentionSpec, Pages, PlannedBatch
from ...pallas_kernels.norm import rms_norm
from ..attention import Attention, attention
from ..context import Context
from ..embedding import embed
from ..kv_pages import KVSpec
from ..linear import Matrix, Norm, linear_sum
from ..mlp import GatedMlp, gated_mlp
from ..param import Kind, Param, Slice, fused_param, linear_param, vector_param
from ..rope import Rope, RopeConfig, build_rope, rotary_tables
from .config_reader import ConfigError, ConfigReader


@dataclass(frozen=True)
class DecoderSpec:
    """Everything about the architecture that the code below depends on."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    rope: RopeConfig
    tie_embeddings: bool
    windows: tuple[int | None, ...]  # one per layer
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.windows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    attention_norm: Any  # [hidden]
    attention: Attention
    mlp_norm: Any  # [hidden]
    mlp: GatedMlp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    embedding: Any  # [vocab, hidden]
    blocks: tuple[Block, ...]
    norm: Any  # [hidden]
    head: Any  # [vocab, hidden]; None: the embedding is read again


def read_config(reader: ConfigReader) -> DecoderSpec:
    heads = reader.take_positive("num_attention_heads")
    hidden = reader.take_positive("hidden_size")
    head_dim = reader.take_positive("head_dim", hidden // heads)
    attention_bias = reader.take("attention_bias", bool, False)
    return DecoderSpec(
        **read_common(reader, heads, head_dim),
        windows=(None,) * reader.take_positive("num_hidden_layers"),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=reader.take("mlp_bias", bool, False),
    )


def read_common(
    reader: ConfigReader, heads: int, head_dim: int, *, kv_heads_if_absent: int | None = None
) -> dict[str, Any]:
    """The keys that this family shares. A null num_key_value_heads means as many as heads; an
    absent one too, or what the family assumes.
    """
    reader.require("hidden_act", ("silu", "swish"), "silu")
    return {
        "vocab_size": reader.take_positive("vocab_size"),
        "hidden_size": reader.take_positive("hidden_size"),
        "mlp_size": reader.take_positive("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(reader, heads, kv_heads_if_absent or heads),
        "head_dim": head_dim,
        "epsilon": reader.take("rms_norm_eps", float, 1e-6),
        "rope": reader.take_rope(head_dim),
        "tie_embeddings": reader.take("tie_word_embeddings", bool, False),
    }


def _kv_heads(reader: ConfigReader, heads: int, absent: int) -> int:
    count = reader.take_positive("num_key_value_heads", heads)
    if not reader.has("num_key_value_heads"):
        count = absent
    if heads % count:
        raise ConfigError(
            f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {count}; "
            "the config is damaged or of another architecture"
        )
    return count


class Decoder:
    """The forward pass of one spec. Stateless; weights and cache are arguments."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.rope: Rope = build_rope(spec.rope)
        self.attention = AttentionSpec(spec.head_dim**-0.5, norm_epsilon=spec.epsilon)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.spec.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    def kv_specs(self) -> list[KVSpec]:
        """What each layer caches."""
        s = self.spec
        return [KVSpec(s.num_kv_heads, s.head_dim, s.head_dim, window) for window in s.windows]

    def divided(self) -> dict[str, int]:
        """What tensor parallelism divides, by its name in the config: whole parts only."""
        return {
            "num_attention_heads": self.spec.num_heads,
            "intermediate_size": self.spec.mlp_size,
        }

    def params(self) -> Weights:
        """The tree of Params."""
        s = self.spec
        embedding = _table("model.embed_tokens.weight", s)
        return Weights(
            embedding=embedding,
            blocks=tuple(_block_params(i, s) for i in range(s.num_layers)),
            norm=_norm("model.norm.weight", s.hidden_size),
            head=None if s.tie_embeddings else linear_param(
                "lm_head.weight", (s.vocab_size, s.hidden_size), ("vocab", "hidden")
            ),
        )  # fmt: skip

    def is_unused(self, tensor: str) -> bool:
        """Tensors that published files carry and the model does not read: a tied head, old rope
        buffers.
        """
        is_tied_head = self.spec.tie_embeddings and tensor == "lm_head.weight"
        return is_tied_head or tensor.endswith(".self_attn.rotary_emb.inv_freq")

    def embed(self, weights: Weights, token_ids: jax.Array, ctx: Context) -> jax.Array:
        """f32[tokens, hidden] from i32[tokens]."""
        return embed(token_ids, weights.embedding, ctx)

    def tables(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rotary tables of a step, computed once for all layers."""
        return rotary_tables(positions, self.rope)

    def block(
        self,
        x: jax.Array,  # f32[tokens, hidden]
        weights: Block,
        kv: Pages,
        step: PlannedBatch,
        tables: tuple[jax.Array, jax.Array],
        ctx: Context,
    ) -> tuple[jax.Array, Pages]:
        """One layer; the residual stream stays in f32."""
        heads, kv = self.attend(x, weights, kv, step, tables, ctx)
        return self.rest(x, heads, weights, step.batch.num_tokens, ctx), kv

    def attend(
        self,
        x: jax.Array,  # f32[tokens, hidden]
        weights: Block,
        kv: Pages,
        step: PlannedBatch,
        tables: tuple[jax.Array, jax.Array],
        ctx: Context,
    ) -> tuple[jax.Array, Pages]:
        """All of a layer that a token needs of the others: f32[tokens, heads * head_dim]."""
        norm = Norm(weights.attention_norm, self.spec.epsilon)
        return attention(x, norm, weights.attention, kv, step, tables, self.attention, ctx)

    def rest(
        self,
        x: jax.Array,  # f32[tokens, hidden]
        heads: jax.Array,  # f32[tokens, heads * head_dim]
        weights: Block,
        count: jax.Array,  # i32[]; tokens from there on are padding
        ctx: Context,
    ) -> jax.Array:
        """What a layer makes of each token by itself: f32[tokens, hidden]."""
        w = weights.attention
        x = linear_sum(heads, w.out, w.out_bias, x, count, ctx.model_axis)
        norm = Norm(weights.mlp_norm, self.spec.epsilon)
        return gated_mlp(x, norm, weights.mlp, count, ctx)

    def final_norm(self, weights: Weights, x: jax.Array) -> jax.Array:
        """f32[tokens, hidden]: what the head reads."""
        return rms_norm(x, weights.norm, self.spec.epsilon)

    def head(self, weights: Weights) -> Matrix:
        """[vocab, hidden]: its product with normed hidden states are the logits."""
        head: Matrix = weights.embedding if weights.head is None else weights.head
        return head


def _table(tensor: str, s: DecoderSpec) -> Param:
    return Param(
        (s.vocab_size, s.hidden_size),
        ("vocab", "hidden"),
        (Slice("embed", tensor, s.vocab_size),),
        Kind.LINEAR if s.tie_embeddings else Kind.EMBEDDING,
    )


def _norm(tensor: str, size: int) -> Param:
    return vector_param({"norm": (tensor, size)}, "hidden", fill=1.0)


def _block_params(i: int, s: DecoderSpec) -> Block:
    at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
    q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    rows = {"q": q, "k": kv, "v": kv}

    def bias(tensor: str, size: int, wanted: bool) -> Param | None:
        return vector_param({"bias": (tensor, size)}, "hidden", fill=0.0) if wanted else None

    def fused_bias(
        parts: dict[str, tuple[str, int]], axis: str, wanted: bool, unit: int = 1
    ) -> Param | None:
        return vector_param(parts, axis, fill=0.0, unit=unit) if wanted else None

    return Block(
        attention_norm=_norm(f"model.layers.{i}.input_layernorm.weight", s.hidden_size),
        attention=Attention(
            qkv=fused_param(
                {n: (f"{at}.{n}_proj.weight", r) for n, r in rows.items()},
                s.hidden_size,
                ("heads", "hidden"),
                unit=s.head_dim,
            ),
            qkv_bias=fused_bias(
                {n: (f"{at}.{n}_proj.bias", r) for n, r in rows.items()},
                "heads",
                s.qkv_bias,
                s.head_dim,
            ),
            out=linear_param(f"{at}.o_proj.weight", (s.hidden_size, q), ("hidden", "heads")),
            out_bias=bias(f"{at}.o_proj.bias", s.hidden_size, s.out_bias),
            q_norm=vector_param({"norm": (f"{at}.q_norm.weight", s.head_dim)}, None, fill=1.0)
            if s.head_norm
            else None,
            k_norm=vector_param({"norm": (f"{at}.k_norm.weight", s.head_dim)}, None, fill=1.0)
            if s.head_norm
            else None,
        ),
        mlp_norm=_norm(f"model.layers.{i}.post_attention_layernorm.weight", s.hidden_size),
        mlp=GatedMlp(
            gate_up=fused_param(
                {n: (f"{mlp}.{n}_proj.weight", s.mlp_size) for n in ("gate", "up")},
                s.hidden_size,
                ("mlp", "hidden"),
                Kind.GATED,
            ),
            gate_up_bias=fused_bias(
                {n: (f"{mlp}.{n}_proj.bias", s.mlp_size) for n in ("gate", "up")}, "mlp", s.mlp_bias
            ),
            down=linear_param(
                f"{mlp}.down_proj.weight", (s.hidden_size, s.mlp_size), ("hidden", "mlp")
            ),
            down_bias=bias(f"{mlp}.down_proj.bias", s.hidden_size, s.mlp_bias),
        ),
    )
