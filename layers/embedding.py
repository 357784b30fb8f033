"""Token embeddings, split over the vocabulary when the mesh has a model axis."""

import jax
from jax import lax

from .context import Context
from .linear import Matrix
from .vocab import local_ids


def embed(token_ids: jax.Array, table: Matrix, ctx: Context) -> jax.Array:
    """f32[tokens, hidden]: row `token_ids` of table [vocab, hidden]; ids outside the vocabulary
    give zeros.
    """
    if ctx.model_axis is None:
        return table.rows(token_ids)
    # An id of another shard reads zeros, past the end.
    local = local_ids(token_ids, table.num_rows, ctx.model_axis)
    return lax.psum(table.rows(local), ctx.model_axis)
