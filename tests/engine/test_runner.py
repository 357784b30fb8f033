"""The compiled programs keep the big arrays in place, and there are as many as planned."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from quire import LLM
from quire.engine.runner import Runner

from ..llm.engines import start


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with start("mistral_sliding", kv_cache_memory_bytes=1 << 20) as llm:
        yield llm._engine.core.runner


def num_bytes(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def test_forward_updates_pages_and_lengths_in_place(runner: Runner) -> None:
    for tokens in runner.buckets.tokens:
        analysis = runner._executables[f"forward[{tokens}]"].memory_analysis()
        assert analysis.alias_size_in_bytes == num_bytes((runner._kv, runner._lengths))


def test_several_steps_update_pages_lengths_and_rows_in_place() -> None:
    """A copy in the loop would be one of the whole cache, in every step."""
    with start("mistral_sliding", kv_cache_memory_bytes=1 << 20, decode_steps=2) as llm:
        runner = llm._engine.core.runner
        donated = num_bytes((runner._kv, runner._lengths, runner._rows))
        pages = f"f32[{','.join(map(str, runner._kv[0].k.shape))}]"
        programs = [e for name, e in runner._executables.items() if name.startswith("2 x ")]
        assert programs
        for program in programs:
            assert program.memory_analysis().alias_size_in_bytes == donated
            lines = program.as_text().splitlines()
            assert not [line for line in lines if " copy(" in line and f"= {pages}" in line]


def test_no_forward_program_copies_pages_or_weights(runner: Runner) -> None:
    pages = runner._kv[0].k
    shapes = {
        f"f32[{','.join(map(str, a.shape))}]"
        for a in (pages, *jax.tree.leaves(runner._weights))
        if a.ndim > 1
    }
    for tokens in runner.buckets.tokens:
        text = runner._executables[f"forward[{tokens}]"].as_text()
        copies = [line for line in text.splitlines() if " copy(" in line]
        assert not [line for line in copies if any(f"= {s}" in line for s in shapes)]


def test_sample_and_update_change_rows_in_place(runner: Runner) -> None:
    rows = num_bytes(runner._rows)
    for name, executable in runner._executables.items():
        if name.startswith("sample"):
            assert executable.memory_analysis().alias_size_in_bytes == rows
        if name.startswith("update"):
            assert executable.memory_analysis().alias_size_in_bytes >= rows


def test_programs_are_those_of_the_plan(runner: Runner) -> None:
    assert set(runner._executables) == {s.name for s in runner.program_specs()} | {"allocate"}


def test_lazy_engine_compiles_on_first_use_only() -> None:
    with start("llama32_tied", lazy_compile=True) as llm:
        assert set(programs(llm)) == {"allocate"}
        llm.generate([[5, 6]], use_tqdm=False)
        some = set(programs(llm))
        assert {"forward[8]", "update_rows"} < some
        llm.generate([[7, 8]], use_tqdm=False)
        assert set(programs(llm)) == some


def programs(llm: LLM) -> dict[str, Any]:
    return llm._engine.core.runner._executables
