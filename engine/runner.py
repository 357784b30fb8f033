"""The device side of a step: weights, KV pages and row state, and the compiled programs over them.

The runner owns every device array. Its arrays are donated to the programs and replaced by what they
return, so nothing outside may hold one.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..layers import rows
from ..layers.batch import StepLayout
from ..layers.programs import SCORE_ROWS, Hidden, Variant
from ..layers.sampling import Sampled, TokenLogprobs
from .compiler import CompileReport, ProgramSpec, compile_all
from .lowering import ROWS_PER_UPDATE, Lowering, default_tables, loop_name, sample_name

__all__ = ["ROWS_PER_UPDATE", "Runner"]


class Runner:
    """Compiles the programs of one engine and runs them on the arrays it owns."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.programs = lowering.programs
        self.buckets = lowering.buckets
        self.num_pages = lowering.num_pages
        self.num_logprobs = lowering.num_logprobs
        self._weights: Any = None
        self._head: Any = None  # of the weights: to hand all of them to a program takes time
        self._executables: dict[str, Any] = {}
        self._specs = {spec.name: spec for spec in lowering.program_specs()}
        self._kv: Any = None
        self._rows: Any = None
        self._lengths: Any = None
        self._open_masks: dict[int, Any] = {}  # by rows: masks that allow everything

    def program_specs(self) -> list[ProgramSpec]:
        """Every program of this engine."""
        return [*self._specs.values()]

    def compile(self, progress: Callable[[str], None] = lambda name: None) -> CompileReport:
        """Build every program; afterwards no step compiles."""
        self._executables, report = compile_all(
            self._specs.values(), progress, self.lowering.options
        )
        return report

    def workspace_bytes(self) -> int:
        """Scratch memory and results of the hungriest program."""
        sizes = [e.memory_analysis() for e in self._executables.values()]
        return max(map(_workspace, sizes), default=0)

    def largest_workspace_bytes(self) -> int:
        """Of the largest forward program, compiled for this question."""
        name = f"forward[{self.buckets.tokens[-1]}]"
        return _workspace(self._compiled(self._specs[name].lower).memory_analysis())

    def code_bytes(self) -> int:
        """Machine code of all programs, as the compiler counts it."""
        sizes = [e.memory_analysis() for e in self._executables.values()]
        return sum(s.generated_code_size_in_bytes for s in sizes if s is not None)

    # Device state

    def set_weights(self, weights: Any) -> None:
        self._weights, self._head = weights, self.programs.model.head(weights)

    def allocate(self) -> None:
        """Zeroed KV pages and rows, replacing what was there. Called at start and after a failed
        step.
        """
        self._kv = self._rows = self._lengths = None  # free the old before making the new
        made = self._program("allocate", self.lowering.allocate)()
        self._kv, self._rows, self._lengths, self._open_masks = made

    def release(self) -> None:
        """Free every device array and program; the runner is of no further use."""
        self._weights = self._head = self._kv = self._rows = self._lengths = None
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
            tables = default_tables(self.programs.model.vocab_size)
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
            arguments = _private(packed), rows.padded_tables(tables, self.lowering.vocab)
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
        run = self._program(loop_name(layout, variant))
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
        run = self._program(sample_name(num_rows, variant))
        mask = self._open_masks[num_rows] if step_mask is None else self._padded_mask(step_mask)
        made = run(self._head, self._rows, hidden.rows, hidden.slots, hidden.flags, mask)
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
        scores: TokenLogprobs = run(self._head, hidden, np.int32(first), _private(targets))
        return scores

    def _padded_mask(self, mask: np.ndarray) -> np.ndarray:
        """A copy, with the words of a padded vocabulary."""
        return np.pad(mask, ((0, 0), (0, rows.num_words(self.lowering.vocab) - mask.shape[1])))

    def _program(self, name: str, lower: Callable[[], Any] | None = None) -> Any:
        """The executable; compiled now when compilation is lazy (or for `allocate`, at start)."""
        if name not in self._executables:
            lower = lower or self._specs[name].lower
            self._executables[name] = self._compiled(lower)
        return self._executables[name]

    def replace_program(self, name: str, executable: Any) -> Any:
        """Run another executable under this name from now on; returns the one before. For benches
        that compare."""
        before, self._executables[name] = self._program(name), executable
        return before

    def _compiled(self, lower: Callable[[], Any]) -> Any:
        return lower().compile(compiler_options=self.lowering.options)


def _workspace(analysis: Any) -> int:
    """Bytes; those of two steps' results, since the host reads one while the next is made."""
    if analysis is None:
        return 0
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.temp_size_in_bytes + 2 * results)


def _private(array: Any) -> Any:
    """A copy of a host array that nobody else can write: on CPU a program reads it in place."""
    return array.copy() if isinstance(array, np.ndarray) else array


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
