"""Token embeddings, split over the vocabulary when the mesh has a model axis."""

import jax
import jax.numpy as jnp
from jax import lax

from .context import Context
from .linear import Matrix


def embed(token_ids: jax.Array, table: Matrix, ctx: Context) -> jax.Array:
    """f32[tokens, hidden]: row `token_ids` of table [vocab, hidden]; ids outside the vocabulary
    give zeros.
    """
    if ctx.model_axis is None:
        return table.rows(token_ids)
    rows = table.num_rows
    local = token_ids - lax.axis_index(ctx.model_axis) * rows
    # An id of another shard must not wrap around: send it past the end, where it reads zeros.
    local = jnp.where((local >= 0) & (local < rows), local, rows)
    return lax.psum(table.rows(local), ctx.model_axis)
