"""The programs of one engine as jax lowers them: their arguments, shardings and donations.

Everything that runs in a step exists because it is listed here. Nothing here holds an array.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers import rows
from ..layers.batch import NUM_FLAGS, StepLayout
from ..layers.kv_pages import abstract_pages
from ..layers.mesh import MODEL, partition
from ..layers.param import map_params
from ..layers.programs import Programs, Variant
from ..layers.quantization.registry import WeightFormat
from ..layers.sharding import local_param
from ..layers.vocab import padded_vocab
from ..layers.weights import array_shape
from .buckets import Buckets
from .compiler import ProgramSpec
from .xla_options import compiler_options

# Rows that one update program writes; a row that carries tables goes alone.
ROWS_PER_UPDATE = 8

_REPLICATED = PartitionSpec()
_MASK = PartitionSpec(None, MODEL)


class Lowering:
    """Traces and lowers the programs of `buckets` for the devices of a mesh.

    options: XLA's, for compiling them. vocab: columns of the logits, padding of shards included.
    """

    def __init__(
        self,
        programs: Programs,
        buckets: Buckets,
        mesh: Mesh,
        weight_format: WeightFormat,
        *,
        num_pages: int,
        kv_dtype: np.dtype[Any],
        num_logprobs: int,
    ) -> None:
        self.programs = programs
        self.buckets = buckets
        self.num_pages = num_pages
        self.num_logprobs = num_logprobs
        self.options = compiler_options(mesh.devices.flat[0].platform)
        self.mesh = mesh
        self._format = weight_format
        self._kv_dtype = kv_dtype
        self._num_shards = mesh.shape[MODEL]
        stack = (None,) * programs.ctx.ops.stacks_layers
        self._kv_spec = PartitionSpec(*stack, None, MODEL)
        self.vocab = padded_vocab(programs.model.vocab_size, self._num_shards)

    def program_specs(self) -> list[ProgramSpec]:
        """Every program of this engine, the largest first: it is the last to finish compiling."""
        specs = [
            ProgramSpec(layout.name, partial(self.forward, layout))
            for layout in reversed(self.buckets.forward_layouts())
        ]
        specs += [
            ProgramSpec(loop_name(layout, variant), partial(self.decode, layout, variant))
            for layout, variant in reversed(self.buckets.loop_programs())
        ]
        specs += [
            ProgramSpec(sample_name(rows, variant), partial(self.sample, rows, variant))
            for rows, variant in self.buckets.sample_programs()
        ]
        specs += [
            ProgramSpec(f"score[{n},{k}]", partial(self.score, n, k))
            for n, k in self.buckets.score_programs()
        ]
        specs += [
            ProgramSpec("update_rows", partial(self.update, ROWS_PER_UPDATE, False)),
            ProgramSpec("update_row_tables", partial(self.update, 1, True)),
        ]
        return specs

    def row_bytes(self) -> int:
        """Of the rows on one device."""
        return sum(
            int(np.prod(a.sharding.shard_shape(a.shape), dtype=np.int64)) * a.dtype.itemsize
            for a in jax.tree.leaves(self._abstract_rows())
        )

    def _abstract(
        self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec = _REPLICATED
    ) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _placed(self, tree: Any, specs: Any) -> Any:
        return jax.tree.map(lambda a, spec: self._abstract(a.shape, a.dtype, spec), tree, specs)

    def _weight_arguments(self) -> tuple[Any, Any]:
        """The weights' abstract arrays and their partition specs."""
        params, num_shards = self.programs.model.params(), self._num_shards

        def wrap(param: Any, array: Any) -> Any:
            return self._format.wrap(local_param(param, num_shards), array)

        def abstract(param: Any) -> Any:
            shape = array_shape(param, self._format, num_shards)
            return wrap(param, self._abstract(shape, self._format.dtype, partition(param.axes)))

        return map_params(abstract, params), map_params(
            lambda param: wrap(param, partition(param.axes)), params
        )

    def _abstract_kv(self) -> Any:
        p, is_stacked = self.programs, self.programs.ctx.ops.stacks_layers
        pages = abstract_pages(
            p.kv_layout, self.num_pages, p.page_size, self._kv_dtype, is_stacked=is_stacked
        )
        return jax.tree.map(lambda a: self._abstract(a.shape, a.dtype, self._kv_spec), pages)

    def _abstract_rows(self) -> Any:
        state = rows.abstract_rows(self.buckets.slots, self.vocab)
        return self._placed(state, rows.row_partition())

    def _lengths_array(self) -> Any:
        return self._abstract((self.buckets.slots,), jnp.int32)

    def _lower(
        self, function: Any, arguments: tuple[Any, ...], in_specs: Any, out_specs: Any, donate: Any
    ) -> Any:
        """Trace `function` as one shard_map over the mesh and lower it."""
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate).lower(*arguments)

    def forward(self, layout: StepLayout) -> Any:
        weights, specs = self._weight_arguments()
        lengths = self._lengths_array()
        packed = self._abstract((layout.size,), jnp.int32)
        return self._lower(
            partial(self.programs.forward, layout=layout),
            (weights, self._abstract_kv(), lengths, lengths, packed),
            (specs, self._kv_spec, _REPLICATED, _REPLICATED, _REPLICATED),
            (_REPLICATED, self._kv_spec, _REPLICATED),
            donate=(1, 2),
        )

    def decode(self, layout: StepLayout, variant: Variant) -> Any:
        weights, specs = self._weight_arguments()
        packed, mask = self._abstract((layout.size,), jnp.int32), self._abstract_mask(layout.rows)
        state = rows.row_partition()
        return self._lower(
            partial(self.programs.decode, layout=layout, variant=variant),
            (
                weights, self._abstract_kv(), self._lengths_array(), self._abstract_rows(), packed,
                mask,
            ),
            (specs, self._kv_spec, _REPLICATED, state, _REPLICATED, _MASK),
            (_REPLICATED, self._kv_spec, _REPLICATED, state),
            donate=(1, 2, 3),
        )  # fmt: skip

    def sample(self, num_rows: int, variant: Variant) -> Any:
        head, specs = map(self.programs.model.head, self._weight_arguments())
        arguments = (
            head,
            self._abstract_rows(),
            self._hidden(num_rows),
            self._abstract((num_rows,), jnp.int32),
            self._abstract((NUM_FLAGS,), jnp.int32),
            self._abstract_mask(num_rows),
        )
        state = rows.row_partition()
        in_specs = (specs, state, _REPLICATED, _REPLICATED, _REPLICATED, _MASK)
        function = partial(self.programs.sample, variant=variant)
        return self._lower(function, arguments, in_specs, (_REPLICATED, state), donate=(1,))

    def score(self, positions: int, num_targets: int) -> Any:
        head, specs = map(self.programs.model.head, self._weight_arguments())
        first = self._abstract((), jnp.int32)
        targets = self._abstract((num_targets,), jnp.int32)
        return self._lower(
            partial(self.programs.score, num_logprobs=self.num_logprobs),
            (head, self._hidden(positions), first, targets),
            (specs, _REPLICATED, _REPLICATED, _REPLICATED),
            _REPLICATED,
            donate=(),
        )

    def update(self, num_rows: int, with_tables: bool) -> Any:
        packed = self._abstract((num_rows, rows.NUM_COLUMNS), jnp.int32)
        arguments: tuple[Any, ...] = (self._abstract_rows(), self._lengths_array(), packed)
        state = rows.row_partition()
        in_specs: tuple[Any, ...] = (state, _REPLICATED, _REPLICATED)
        if with_tables:
            specs = rows.table_partition()
            tables = self._placed(default_tables(self.vocab), specs)
            function, arguments = rows.update_rows, (*arguments, tables)
            in_specs = (*in_specs, specs)
        else:
            function = partial(rows.update_rows, tables=None)
        return self._lower(function, arguments, in_specs, (state, _REPLICATED), donate=(0, 1))

    def allocate(self) -> Any:
        kv, state, lengths = self._abstract_kv(), self._abstract_rows(), self._lengths_array()
        masks = {n: self._abstract_mask(n) for n in self.buckets.rows}

        def make() -> Any:
            zeros = partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))
            open_masks = jax.tree.map(lambda a: jnp.full(a.shape, 0xFFFFFFFF, a.dtype), masks)
            pages = jax.tree.map(lambda a: self.programs.ctx.ops.zeros(a.shape, a.dtype), kv)
            return pages, zeros(state), zeros(lengths), open_masks

        shardings = jax.tree.map(lambda a: a.sharding, (kv, state, lengths, masks))
        return jax.jit(make, out_shardings=shardings).lower()

    def _abstract_mask(self, num_rows: int) -> Any:
        return self._abstract((num_rows, rows.num_words(self.vocab)), jnp.uint32, _MASK)

    def _hidden(self, count: int) -> Any:
        return self._abstract((count, self.programs.model.hidden_size), jnp.float32)


def sample_name(num_rows: int, variant: Variant) -> str:
    return f"sample[{num_rows},{variant.value}]"


def loop_name(layout: StepLayout, variant: Variant) -> str:
    return f"{layout.name}[{variant.value}]"


def default_tables(vocab: int) -> rows.RowTables:
    bits = np.zeros(rows.num_words(vocab), np.uint32)
    return rows.RowTables(bits, bits, bits, np.zeros(vocab, np.int16))
