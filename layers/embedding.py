"""Token embeddings, split over the vocabulary when the mesh has a model axis."""

import jax
import jax.numpy as jnp
from jax import lax

from .context import Context


def embed(token_ids: jax.Array, table: jax.Array, ctx: Context) -> jax.Array:
    """f32[tokens, hidden]: row `token_ids` of table [vocab, hidden]; ids outside the vocabulary
    give zeros.
    """
    if ctx.model_axis is None:
        return table.at[token_ids].get(mode="fill", fill_value=0).astype(jnp.float32)
    rows = table.shape[0]
    local = token_ids - lax.axis_index(ctx.model_axis) * rows
    # An id of another shard must not wrap around: send it past the end, where it reads zeros.
    local = jnp.where((local >= 0) & (local < rows), local, rows)
    part = table.at[local].get(mode="fill", fill_value=0).astype(jnp.float32)
    return lax.psum(part, ctx.model_axis)
