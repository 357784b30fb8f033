"""The device side of a step: weights, KV pages and row state, and the compiled programs over them.

The runner owns every device array. Its arrays are donated to the programs and replaced by what they
return, so nothing outside may hold one.
"""

from collections.abc import Callable
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
from ..layers.programs import SCORE_ROWS, Hidden, Programs, Variant
from ..layers.quantization.registry import WeightFormat
from ..layers.sampling import Sampled, TokenLogprobs
from ..layers.sharding import local_param
from ..layers.vocab import padded_vocab
from ..layers.weights import array_shape
from .buckets import Buckets
from .compiler import CompileReport, ProgramSpec, compile_all

# Rows that one update program writes; a row that carries tables goes alone.
ROWS_PER_UPDATE = 8

_REPLICATED = PartitionSpec()
_KV = PartitionSpec(None, MODEL)
_MASK = PartitionSpec(None, MODEL)


class Runner:
    """Compiles the programs of `buckets` and runs them on the arrays it owns."""

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
        self._mesh = mesh
        self._format = weight_format
        self._kv_dtype = kv_dtype
        self.num_logprobs = num_logprobs
        self._num_shards = mesh.shape[MODEL]
        self._vocab = padded_vocab(programs.model.vocab_size, self._num_shards)
        self._weights: Any = None
        self._executables: dict[str, Any] = {}
        self._specs = {spec.name: spec for spec in self.program_specs()}
        self._kv: Any = None
        self._rows: Any = None
        self._lengths: Any = None
        self._open_masks: dict[int, Any] = {}  # by rows: masks that allow everything

    # What exists

    def program_specs(self) -> list[ProgramSpec]:
        """Every program of this engine, the largest first: it is the last to finish compiling."""
        specs = [
            ProgramSpec(layout.name, partial(self._lower_forward, layout))
            for layout in reversed(self.buckets.forward_layouts())
        ]
        specs += [
            ProgramSpec(_loop_name(layout, variant), partial(self._lower_decode, layout, variant))
            for layout, variant in reversed(self.buckets.loop_programs())
        ]
        specs += [
            ProgramSpec(_sample_name(rows, variant), partial(self._lower_sample, rows, variant))
            for rows, variant in self.buckets.sample_programs()
        ]
        specs += [
            ProgramSpec(f"score[{n},{k}]", partial(self._lower_score, n, k))
            for n, k in self.buckets.score_programs()
        ]
        specs += [
            ProgramSpec("update_rows", partial(self._lower_update, ROWS_PER_UPDATE, False)),
            ProgramSpec("update_row_tables", partial(self._lower_update, 1, True)),
        ]
        return specs

    def compile(self, progress: Callable[[str], None] = lambda name: None) -> CompileReport:
        """Build every program; afterwards no step compiles."""
        self._executables, report = compile_all(self._specs.values(), progress)
        return report

    def workspace_bytes(self) -> int:
        """Scratch memory of the hungriest program."""
        sizes = [e.memory_analysis() for e in self._executables.values()]
        return max((s.temp_size_in_bytes for s in sizes if s is not None), default=0)

    def largest_workspace_bytes(self) -> int:
        """Scratch memory of the largest forward program, compiled for this question."""
        name = f"forward[{self.buckets.tokens[-1]}]"
        analysis = self._specs[name].lower().compile().memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes

    def code_bytes(self) -> int:
        """Machine code of all programs, as the compiler counts it."""
        sizes = [e.memory_analysis() for e in self._executables.values()]
        return sum(s.generated_code_size_in_bytes for s in sizes if s is not None)

    def row_bytes(self) -> int:
        """Of the rows on one device."""
        return sum(
            int(np.prod(a.sharding.shard_shape(a.shape), dtype=np.int64)) * a.dtype.itemsize
            for a in jax.tree.leaves(self._abstract_rows())
        )

    # Device state

    def set_weights(self, weights: Any) -> None:
        self._weights = weights

    def allocate(self) -> None:
        """Zeroed KV pages and rows, replacing what was there. Called at start and after a failed
        step.
        """
        self._kv = self._rows = self._lengths = None  # free the old before making the new
        made = self._program("allocate", self._lower_allocate)()
        self._kv, self._rows, self._lengths, self._open_masks = made

    def release(self) -> None:
        """Free every device array and program; the runner is of no further use."""
        self._weights = self._kv = self._rows = self._lengths = None
        self._open_masks, self._executables = {}, {}

    def warm_up(self) -> None:
        """Run every program on padding: first runs touch memory, and capture graphs on a GPU, which
        the second ones replay.
        """
        for _ in range(1 if jax.default_backend() == "cpu" else 2):
            for layout in self.buckets.forward_layouts():
                hidden = self.forward(_padding(layout), layout)
                for variant in Variant:
                    sampled = self.sample(hidden, variant)
                self.score(hidden.rows, 0, sampled.token)
                self.score(hidden.tokens, 0, np.zeros(SCORE_ROWS, np.int32))
            for layout, variant in self.buckets.loop_programs():
                self.decode(_padding(layout), layout, variant)
            self.update_rows(_padding_rows(ROWS_PER_UPDATE, self.buckets.slots))
            tables = _default_tables(self.programs.model.vocab_size)
            self.update_rows(_padding_rows(1, self.buckets.slots), tables)
        jax.block_until_ready(self._lengths)

    # One step

    def update_rows(self, packed: np.ndarray, tables: rows.RowTables | None = None) -> None:
        """Write whole rows: packed i32[ROWS_PER_UPDATE, NUM_COLUMNS], or one and its tables."""
        if tables is None:
            run = self._program("update_rows")
            self._rows, self._lengths = run(self._rows, self._lengths, _private(packed))
        else:
            run = self._program("update_row_tables")
            # Padding copies.
            arguments = _private(packed), rows.padded_tables(tables, self._vocab)
            self._rows, self._lengths = run(self._rows, self._lengths, *arguments)

    def forward(self, packed: np.ndarray, layout: StepLayout) -> Hidden:
        """Run one packed step."""
        run = self._program(layout.name)
        made = run(self._weights, self._kv, self._lengths, self._rows.last_token, _private(packed))
        hidden: Hidden = made[0]
        self._kv, self._lengths = made[1:]
        return hidden

    def decode(self, packed: np.ndarray, layout: StepLayout, variant: Variant) -> jax.Array:
        """Run up to layout.num_steps steps: i32[num_steps, 2, rows], token and flag of each."""
        run = self._program(_loop_name(layout, variant))
        made = run(
            self._weights, self._kv, self._lengths, self._rows, _private(packed),
            self._open_masks[layout.rows],
        )  # fmt: skip
        tokens: jax.Array = made[0]
        self._kv, self._lengths, self._rows = made[1:]
        return tokens

    def sample(
        self, hidden: Hidden, variant: Variant, step_mask: np.ndarray | None = None
    ) -> Sampled:
        """One token for each row that samples; step_mask: u32[rows, words], tokens allowed in this
        step.
        """
        num_rows = hidden.slots.shape[0]
        run = self._program(_sample_name(num_rows, variant))
        mask = self._open_masks[num_rows] if step_mask is None else self._padded_mask(step_mask)
        made = run(self._weights, self._rows, hidden.rows, hidden.slots, hidden.flags, mask)
        sampled: Sampled = made[0]
        self._rows = made[1]
        return sampled

    def score(
        self, hidden: jax.Array, first: int, targets: np.ndarray | jax.Array
    ) -> TokenLogprobs:
        """Logprobs of targets i32[n] after hidden states first, first + 1, …: n is the number of
        rows for Hidden.rows, SCORE_ROWS for Hidden.tokens.
        """
        run = self._program(f"score[{hidden.shape[0]},{targets.shape[0]}]")
        scores: TokenLogprobs = run(self._weights, hidden, np.int32(first), _private(targets))
        return scores

    def _padded_mask(self, mask: np.ndarray) -> np.ndarray:
        """A copy, with the words of a padded vocabulary."""
        return np.pad(mask, ((0, 0), (0, rows.num_words(self._vocab) - mask.shape[1])))

    # Lowering

    def _program(self, name: str, lower: Callable[[], Any] | None = None) -> Any:
        """The executable; compiled now when compilation is lazy (or for `allocate`, at start)."""
        if name not in self._executables:
            lower = lower or self._specs[name].lower
            self._executables[name] = lower().compile()
        return self._executables[name]

    def _abstract(
        self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec = _REPLICATED
    ) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

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
        p = self.programs
        pages = abstract_pages(p.kv_layout, self.num_pages, p.page_size, self._kv_dtype)
        return jax.tree.map(lambda a: self._abstract(a.shape, a.dtype, _KV), pages)

    def _abstract_rows(self) -> Any:
        state = rows.abstract_rows(self.buckets.slots, self._vocab)
        return self._placed(state, rows.row_partition())

    def _lengths_array(self) -> Any:
        return self._abstract((self.buckets.slots,), jnp.int32)

    def _lower(
        self, function: Any, arguments: tuple[Any, ...], in_specs: Any, out_specs: Any, donate: Any
    ) -> Any:
        """Trace `function` as one shard_map over the mesh and lower it."""
        mapped = jax.shard_map(
            function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate).lower(*arguments)

    def _lower_forward(self, layout: StepLayout) -> Any:
        weights, specs = self._weight_arguments()
        lengths = self._lengths_array()
        packed = self._abstract((layout.size,), jnp.int32)
        return self._lower(
            partial(self.programs.forward, layout=layout),
            (weights, self._abstract_kv(), lengths, lengths, packed),
            (specs, _KV, _REPLICATED, _REPLICATED, _REPLICATED),
            (_REPLICATED, _KV, _REPLICATED),
            donate=(1, 2),
        )

    def _lower_decode(self, layout: StepLayout, variant: Variant) -> Any:
        weights, specs = self._weight_arguments()
        packed, mask = self._abstract((layout.size,), jnp.int32), self._abstract_mask(layout.rows)
        lengths, state = self._lengths_array(), self._abstract_rows()
        return self._lower(
            partial(self.programs.decode, layout=layout, variant=variant),
            (weights, self._abstract_kv(), lengths, state, packed, mask),
            (specs, _KV, *(_REPLICATED,) * 4),
            (_REPLICATED, _KV, _REPLICATED, _REPLICATED),
            donate=(1, 2, 3),
        )

    def _lower_sample(self, num_rows: int, variant: Variant) -> Any:
        weights, specs = self._weight_arguments()
        arguments = (
            weights,
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

    def _lower_score(self, positions: int, num_targets: int) -> Any:
        weights, specs = self._weight_arguments()
        first = self._abstract((), jnp.int32)
        targets = self._abstract((num_targets,), jnp.int32)
        return self._lower(
            partial(self.programs.score, num_logprobs=self.num_logprobs),
            (weights, self._hidden(positions), first, targets),
            (specs, _REPLICATED, _REPLICATED, _REPLICATED),
            _REPLICATED,
            donate=(),
        )

    def _lower_update(self, num_rows: int, with_tables: bool) -> Any:
        packed = self._abstract((num_rows, rows.NUM_COLUMNS), jnp.int32)
        arguments: tuple[Any, ...] = (self._abstract_rows(), self._lengths_array(), packed)
        state = rows.row_partition()
        in_specs: tuple[Any, ...] = (state, _REPLICATED, _REPLICATED)
        if with_tables:
            specs = rows.table_partition()
            tables = self._placed(_default_tables(self._vocab), specs)
            function, arguments = rows.update_rows, (*arguments, tables)
            in_specs = (*in_specs, specs)
        else:
            function = partial(rows.update_rows, tables=None)
        return self._lower(function, arguments, in_specs, (state, _REPLICATED), donate=(0, 1))

    def _lower_allocate(self) -> Any:
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
        return self._abstract((num_rows, rows.num_words(self._vocab)), jnp.uint32, _MASK)

    def _hidden(self, count: int) -> Any:
        return self._abstract((count, self.programs.model.hidden_size), jnp.float32)


def _private(array: Any) -> Any:
    """A copy of a host array that nobody else can write: on CPU a program reads it in place."""
    return array.copy() if isinstance(array, np.ndarray) else array


def _sample_name(num_rows: int, variant: Variant) -> str:
    return f"sample[{num_rows},{variant.value}]"


def _loop_name(layout: StepLayout, variant: Variant) -> str:
    return f"{layout.name}[{variant.value}]"


def _padding(layout: StepLayout) -> np.ndarray:
    """A step without tokens."""
    packed = np.zeros(layout.size, np.int32)
    for name in ("row_slot", "sample_slot"):
        offset, shape = layout.parts[name]
        packed[offset : offset + shape[0]] = layout.slots
    return packed


def _padding_rows(count: int, slots: int) -> np.ndarray:
    packed = np.zeros((count, rows.NUM_COLUMNS), np.int32)
    packed[:, 0] = slots
    return packed


def _default_tables(vocab: int) -> rows.RowTables:
    bits = np.zeros(rows.num_words(vocab), np.uint32)
    return rows.RowTables(bits, bits, bits, np.zeros(vocab, np.int16))
