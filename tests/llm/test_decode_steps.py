"""Several steps in one program: the same tokens, and fewer calls of the device."""

import numpy as np
import pytest
from quire import LLM, SamplingParams
from quire.engine.compiler import num_compile_events

from .engines import start
from .test_same_answer import FAMILY, others, requests, run

WINDOWED = "qwen2_mixed_windows"


def tokens(llm: LLM, cases: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in run(llm, cases)]


@pytest.mark.parametrize("family", [FAMILY, WINDOWED])
def test_tokens_are_those_of_one_step_at_a_time(family: str) -> None:
    """Drawn and greedy, penalties among them; queued, so that some are admitted in between."""
    cases = [*others(), *requests()]
    with start(family) as llm:
        expected = tokens(llm, cases)
        num_steps = llm._engine.core.metrics.num_steps
    with start(family, decode_steps=5) as llm:
        before = num_compile_events()
        assert tokens(llm, cases) == expected
        assert tokens(llm, cases[:3]) == expected[:3]
        assert num_compile_events() == before
        num_fewer = llm._engine.core.metrics.num_steps
    assert num_fewer < num_steps


@pytest.mark.parametrize("family", [FAMILY, WINDOWED])
def test_a_small_cache_and_its_preemptions_change_nothing(family: str) -> None:
    cases = others()[:12]
    with start(family) as llm:
        expected = tokens(llm, cases)
        page_bytes = llm._engine.plan.page_bytes
    options = {"decode_steps": 7, "max_num_seqs": 12, "max_model_len": 96}
    with start(family, kv_cache_memory_bytes=page_bytes * 30, **options) as llm:
        assert tokens(llm, cases) == expected
        assert llm._engine.core.scheduler.num_preemptions > 0


def test_a_row_ends_at_its_stop_token_its_limit_and_its_context() -> None:
    prompt = list(range(3, 20))
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with start(FAMILY, decode_steps=8, max_model_len=64) as llm:
        [whole] = tokens(llm, [(prompt, greedy)])
        stop = whole[10]
        first = whole.index(stop)
        cases = [
            SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[stop]),
            SamplingParams(temperature=0, max_tokens=11, ignore_eos=True),
            # More stop tokens than the device looks for; the host sees the last one.
            SamplingParams(
                temperature=0, max_tokens=24, ignore_eos=True,
                stop_token_ids=[*(set(range(3, 60)) - set(whole)), stop],
            ),
            SamplingParams(temperature=0, max_tokens=100, ignore_eos=True),
        ]  # fmt: skip
        by_stop, by_limit, by_many, by_context = run(llm, [(prompt, p) for p in cases])
    for output in (by_stop, by_many):
        assert output.outputs[0].token_ids == whole[: first + 1]
        assert output.outputs[0].stop_reason == stop
    assert by_limit.outputs[0].token_ids == whole[:11]
    assert by_limit.outputs[0].finish_reason == by_context.outputs[0].finish_reason == "length"
    assert len(by_context.outputs[0].token_ids) == 64 - len(prompt)


def test_logprobs_and_bad_words_take_one_step_at_a_time_and_are_right() -> None:
    prompt = list(range(3, 20))
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with start(FAMILY) as llm:
        [expected] = run(llm, [(prompt, plain)])
    wanted = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    with start(FAMILY, decode_steps=4) as llm:
        beside, told = run(llm, [(prompt, plain), (prompt, wanted)])
    for output in (beside, told):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert told.outputs[0].logprobs is not None
    assert len(told.outputs[0].logprobs) == 12
    assert all(np.isfinite(p[t].logprob) for p, t in zip(
        told.outputs[0].logprobs, told.outputs[0].token_ids, strict=True
    ))  # fmt: skip
