"""On a CUDA device: `pytest -m gpu`. The checks are those that `quire.bench.gpu` begins with."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from quire import LLM, SamplingParams
from quire.bench.gpu import correctness
from quire.bench.gpu.attention import Case
from quire.bench.gpu.results import Results
from quire.engine.compiler import num_compile_events

pytestmark = pytest.mark.gpu


@pytest.fixture
def results(tmp_path: Path) -> Results:
    if jax.default_backend() != "gpu":
        pytest.fail("there is no CUDA device; leave these out with -m 'not gpu'")
    return Results(tmp_path, device=jax.devices()[0].device_kind, measured=True, seconds=600)


@pytest.mark.parametrize("case", correctness.ATTENTION, ids=lambda case: case.name)
def test_attention_is_the_references(results: Results, case: Case) -> None:
    correctness.check_attention(results, case, "cuda")
    assert results.lines[-1]["by"] == "mosaic"


@pytest.mark.parametrize("rows", [1, 5, 8, 33, 64])
def test_products_are_the_references(results: Results, rows: int) -> None:
    correctness.check_product(results, rows, "cuda")
    assert results.lines[-1]["by"] == "mosaic"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", correctness.FAMILIES)
def test_tiny_checkpoints_answer_like_the_reference(
    results: Results, family: str, dtype: str
) -> None:
    correctness.check_family(results, family, dtype, "cuda")
    assert results.lines


def test_how_often_neighbours_change_an_answer_is_told(results: Results) -> None:
    correctness.check_neighbours(results, "cuda")
    assert 0 <= results.lines[-1]["value"] <= 1


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=512, max_num_seqs=16, decode_steps=4) as llm:
        yield llm


def test_nothing_compiles_and_no_memory_is_taken_while_it_runs(llm: LLM) -> None:
    stats = jax.devices()[0].memory_stats
    before, compiled = stats()["bytes_in_use"], num_compile_events()
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=64)
    for count in (1, 3, 40):
        outputs = llm.generate([f"Count to {n}." for n in range(count)], params, use_tqdm=False)
        assert all(output.outputs[0].token_ids for output in outputs)
    assert num_compile_events() == compiled
    # What is left of the last step's results; far from a page pool, or from workspaces.
    assert stats()["bytes_in_use"] - before < 64 << 20


def test_the_plan_holds(llm: LLM) -> None:
    plan = llm._engine.plan
    assert jax.devices()[0].memory_stats()["peak_bytes_in_use"] <= plan.limit
    assert plan.used <= plan.limit
