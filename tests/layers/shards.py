"""Functions of logits as programs over all devices there are: one, or several in the process that
test_sharded.py starts, where each has a part of the vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from quire.layers.mesh import MODEL, make_mesh
from quire.layers.rows import num_words
from quire.layers.vocab import Vocabulary, padded_vocab

NUM_SHARDS = jax.device_count()
SAME = PartitionSpec()
BY_TOKEN = PartitionSpec(None, MODEL)


def on_shards(
    function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *, fill: float = 0.0
) -> Callable[..., Any]:
    """function(*arrays, vocab) of arrays that are whole, compiled. The first one is logits.

    fill: what floats hold in the columns of a padded vocabulary.
    """

    def program(*arguments: Any, vocab: Vocabulary) -> Any:
        return function(*arguments, vocab)

    @cache
    def compiled(size: int) -> Any:
        if NUM_SHARDS == 1:
            return jax.jit(lambda *arguments: program(*arguments, vocab=Vocabulary(size)))
        mapped = jax.shard_map(
            lambda *arguments: program(*arguments, vocab=Vocabulary(size, MODEL)),
            mesh=make_mesh(NUM_SHARDS),
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )
        return jax.jit(mapped)

    def run(*arguments: Any) -> Any:
        size = arguments[0].shape[-1]
        width = padded_vocab(size, NUM_SHARDS)

        def pad(spec: PartitionSpec, leaf: Any) -> Any:
            if spec != BY_TOKEN:
                return leaf
            leaf = np.asarray(leaf)
            wanted = num_words(width) if leaf.dtype == np.uint32 else width
            value = fill if leaf.dtype == np.float32 else 0
            return np.pad(leaf, ((0, 0), (0, wanted - leaf.shape[1])), constant_values=value)

        def cut(spec: PartitionSpec, leaf: Any) -> Any:
            if spec != BY_TOKEN:
                return leaf
            return leaf[:, : num_words(size) if leaf.dtype == np.uint32 else size]

        def each(change: Any, specs: Any, tree: Any) -> Any:
            return jax.tree.map(
                lambda spec, part: jax.tree.map(lambda leaf: change(spec, leaf), part), specs, tree
            )

        return each(cut, out_specs, compiled(size)(*each(pad, in_specs, arguments)))

    return run
