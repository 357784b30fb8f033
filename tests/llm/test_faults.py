"""One bad row, or one failed step, ends or delays what it must and nothing else."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from quire import LLM, SamplingParams
from quire.engine.errors import EngineStopped, StepFailed
from quire.layers.linear import DenseWeight

from .engines import start

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(3, 40)), [9] * 17, [100, 200, 300, 400]]
POISONED_TOKEN = 78


@pytest.fixture
def llm() -> Iterator[LLM]:
    with start("llama32_tied") as llm:
        yield llm


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]


def poison_embedding(llm: LLM) -> None:
    """One token's embedding becomes NaN, as a damaged weight would."""
    runner = llm._engine.core.runner
    table = runner._weights.embedding.w
    values = np.array(table)
    values[POISONED_TOKEN] = np.nan
    clean = runner._weights
    poisoned = jax.device_put(values, table.sharding)
    runner._weights = dataclasses.replace(clean, embedding=DenseWeight(poisoned))


def test_row_with_nan_ends_alone() -> None:
    with start("llama2_mha") as llm:  # its head is not tied to the embedding
        expected = tokens(llm)
        assert all(POISONED_TOKEN not in answer for answer in expected)
        poison_embedding(llm)
        bad = [5, POISONED_TOKEN, 6]
        outputs = llm.generate([PROMPTS[0], bad, *PROMPTS[1:], bad], GREEDY, use_tqdm=False)
        answers = [o.outputs[0] for o in outputs]
        for answer in (answers[1], answers[-1]):
            assert answer.finish_reason == "error"
            assert answer.stop_reason == "the logits were not finite"
        assert [a.token_ids for a in (answers[0], *answers[2:-1])] == expected
        assert tokens(llm) == expected  # its pages are in use again, and clean


@pytest.mark.parametrize("failing", ["forward", "sample", "update_rows"])
def test_failed_step_is_recomputed_with_the_same_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    expected = tokens(llm)
    core = llm._engine.core
    runner = core.runner
    real = getattr(runner, failing)
    calls = {"left": 3 if failing != "update_rows" else 0}

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls["left"] -= 1
        if calls["left"] == -1:
            # As after a device fault, the donated arrays are gone.
            for array in jax.tree.leaves((runner._kv, runner._rows)):
                array.delete()
            raise StepFailed("made to fail")
        return result

    monkeypatch.setattr(runner, failing, fail_once)
    shuffled = [p[::-1] for p in PROMPTS]
    assert tokens(llm) == expected
    assert core.metrics.num_failed_steps == 1
    assert tokens(llm, shuffled) != expected
    core.scheduler.audit()


def test_request_that_fails_twice_is_ended_and_others_go_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(llm)
    core = llm._engine.core
    real = core.runner.forward
    bad = [11, 12, 13]

    def fail_with_bad(packed: np.ndarray, num_tokens: int) -> Any:
        if any(c.request.prompt_token_ids == bad for c in core._last_plan.chunks):
            raise StepFailed("made to fail")
        return real(packed, num_tokens)

    monkeypatch.setattr(core.runner, "forward", fail_with_bad)
    (output,) = llm.generate([bad], GREEDY, use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    why = "its steps failed 2 times; the engine's log says why"
    assert output.outputs[0].stop_reason == why
    assert tokens(llm) == expected
    assert core.metrics.num_failed_steps == 2
    assert not core.scheduler.has_work


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    with start("llama32_tied") as llm:
        stream = iter(llm.stream([3], SamplingParams(max_tokens=2000, ignore_eos=True)))
        next(stream)
    with pytest.raises(EngineStopped, match="closed while the request was under way"):
        list(stream)
    with pytest.raises(EngineStopped, match="the engine was closed; make a new one"):
        llm.generate([[3]], GREEDY)


def test_abandoned_stream_frees_its_pages(llm: LLM) -> None:
    core = llm._engine.core
    stream = llm.stream([3, 4], SamplingParams(max_tokens=2000, ignore_eos=True))
    for _ in stream:
        break
    stream.close()
    tokens(llm)  # the abort was taken before these were finished
    assert not core.scheduler.has_work
    assert core.scheduler.pool.num_free == core.runner.num_pages - 1
    core.scheduler.audit()


@pytest.mark.parametrize("failing", ["_pack", "_on_token", "_keep_scores"])
def test_exception_of_one_row_ends_that_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Each of its neighbours was recomputed, and ended with it when its row failed again."""
    expected = tokens(llm)
    core = llm._engine.core
    real = getattr(core, failing)
    bad = [11, 12, 13]

    def fail_for_one(of: Any, *given: Any) -> Any:
        if of.request.prompt_token_ids == bad:
            raise ZeroDivisionError("a fault of ours")
        return real(of, *given)

    monkeypatch.setattr(core, failing, fail_for_one)
    wanting = dataclasses.replace(GREEDY, prompt_logprobs=1)
    params = [GREEDY, wanting, *[GREEDY] * (len(PROMPTS) - 1), wanting]
    outputs = llm.generate([PROMPTS[0], bad, *PROMPTS[1:], bad], params, use_tqdm=False)
    answers = [o.outputs[0] for o in outputs]
    for answer in (answers[1], answers[-1]):
        assert answer.finish_reason == "error"
        assert str(answer.stop_reason).startswith("the engine failed at this request, and at no")
    assert [a.token_ids for a in (answers[0], *answers[2:-1])] == expected
    monkeypatch.undo()
    assert tokens(llm) == expected
    assert core.scheduler.pool.num_free == core.scheduler.pool.num_usable
    core.scheduler.audit()
