"""The forward pass of quire-demo in float32, for training: llama as Hugging Face lays it out.

Weights are a dict by checkpoint tensor name, so that what is trained is what is exported. Knows
whole rows only: no cache, no pages.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

Weights = dict[str, jax.Array]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a llama-architecture model with tied embeddings."""

    vocab_size: int = 1536
    hidden_size: int = 128
    mlp_size: int = 448
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    max_tokens: int = 2048
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5

    def shape_by_tensor(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the checkpoint; matrices are [out, in]."""
        hidden, mlp = self.hidden_size, self.mlp_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        shapes["model.embed_tokens.weight"] = (self.vocab_size, hidden)
        for i in range(self.num_layers):
            at = f"model.layers.{i}"
            shapes |= {
                f"{at}.input_layernorm.weight": (hidden,),
                f"{at}.self_attn.q_proj.weight": (q, hidden),
                f"{at}.self_attn.k_proj.weight": (kv, hidden),
                f"{at}.self_attn.v_proj.weight": (kv, hidden),
                f"{at}.self_attn.o_proj.weight": (hidden, q),
                f"{at}.post_attention_layernorm.weight": (hidden,),
                f"{at}.mlp.gate_proj.weight": (mlp, hidden),
                f"{at}.mlp.up_proj.weight": (mlp, hidden),
                f"{at}.mlp.down_proj.weight": (hidden, mlp),
            }
        return shapes | {"model.norm.weight": (hidden,)}


def init_weights(shape: ModelShape, key: jax.Array) -> Weights:
    """Norms at 1, matrices normal; what adds to the residual stream is scaled by its depth
    (Radford et al. 2019, section 2.3).
    """
    weights = {}
    shapes = shape.shape_by_tensor()
    for (tensor, size), tensor_key in zip(
        shapes.items(), jax.random.split(key, len(shapes)), strict=True
    ):
        if len(size) == 1:
            weights[tensor] = jnp.ones(size)
            continue
        deviation = 0.02 if tensor.endswith("embed_tokens.weight") else size[1] ** -0.5 / 2
        if tensor.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= (2 * shape.num_layers) ** 0.5
        weights[tensor] = jax.random.normal(tensor_key, size) * deviation
    return weights


def forward(
    weights: Weights,
    token_ids: jax.Array,  # i32[rows, tokens]
    segment_ids: jax.Array,  # i32[rows, tokens]
    shape: ModelShape,
) -> jax.Array:
    """f32[rows, tokens, vocab] logits. A token sees the earlier ones of its own segment.

    Positions run through a row: rope depends on differences only, so a segment may start anywhere.
    """
    table = weights["model.embed_tokens.weight"]
    x = table[token_ids]
    tables = _rotary_tables(token_ids.shape[1], shape)
    is_seen = jnp.tril(segment_ids[:, :, None] == segment_ids[:, None, :])  # [rows, tokens, tokens]
    for i in range(shape.num_layers):
        at = f"model.layers.{i}"
        seen = _rms_norm(x, weights[f"{at}.input_layernorm.weight"], shape)
        x = x + _attention(seen, weights, f"{at}.self_attn", is_seen, tables, shape)
        seen = _rms_norm(x, weights[f"{at}.post_attention_layernorm.weight"], shape)
        x = x + _gated_mlp(seen, weights, f"{at}.mlp")
    return _rms_norm(x, weights["model.norm.weight"], shape) @ table.T


def _rms_norm(x: jax.Array, weight: jax.Array, shape: ModelShape) -> jax.Array:
    """Zhang and Sennrich 2019, eq. 4."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.epsilon) * weight


def _rotary_tables(num_tokens: int, shape: ModelShape) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32[tokens, 1, head_dim / 2] each."""
    exponent = jnp.arange(0, shape.head_dim, 2) / shape.head_dim
    angle = jnp.arange(num_tokens)[:, None] / shape.rope_theta**exponent
    return jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]


def _rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """RoFormer eq. 34, half-split layout as in Llama. x: [rows, tokens, heads, head_dim]."""
    cos, sin = tables
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _attention(
    x: jax.Array,  # [rows, tokens, hidden]
    weights: Weights,
    at: str,
    is_seen: jax.Array,  # bool[rows, tokens, tokens]
    tables: tuple[jax.Array, jax.Array],
    shape: ModelShape,
) -> jax.Array:
    """[rows, tokens, hidden]: grouped-query attention (Ainslie et al. 2023)."""
    rows, tokens, _ = x.shape
    split = (rows, tokens, -1, shape.head_dim)
    q, k, v = ((x @ weights[f"{at}.{n}_proj.weight"].T).reshape(split) for n in "qkv")
    q, k = _rotate(q, tables) * shape.head_dim**-0.5, _rotate(k, tables)
    # Heads first, one key a query head: plain batched products, twice as fast on CPU as einsum.
    k, v = (jnp.repeat(t, shape.num_heads // shape.num_kv_heads, axis=2) for t in (k, v))
    q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))
    scores = jnp.where(is_seen[:, None], q @ k.transpose(0, 1, 3, 2), -1e30)
    out = jax.nn.softmax(scores, axis=-1) @ v  # [rows, heads, tokens, head_dim]
    return out.transpose(0, 2, 1, 3).reshape(rows, tokens, -1) @ weights[f"{at}.o_proj.weight"].T


def _gated_mlp(x: jax.Array, weights: Weights, at: str) -> jax.Array:
    """SwiGLU (Shazeer 2020, section 2)."""
    gate = x @ weights[f"{at}.gate_proj.weight"].T
    up = x @ weights[f"{at}.up_proj.weight"].T
    return (jax.nn.silu(gate) * up) @ weights[f"{at}.down_proj.weight"].T
