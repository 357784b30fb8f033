"""A request that another engine began goes on from its tokens to the same end."""

import queue
from collections.abc import Iterator
from dataclasses import replace

import pytest
from quire import LLM, SamplingParams
from quire.engine.core import StepOutput, Submission

from .engines import start

PROMPT = tuple(range(3, 30))
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    "seeded": SamplingParams(temperature=1.2, top_p=0.95, max_tokens=24, ignore_eos=True),
    "penalised": SamplingParams(
        temperature=0.8,
        frequency_penalty=0.7,
        presence_penalty=0.3,
        repetition_penalty=1.3,
        max_tokens=24,
        min_tokens=20,
    ),
    "logprobs": SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=2
    ),
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start("llama32_tied") as engine:
        yield engine


def finish(llm: LLM, submission: Submission) -> list[StepOutput]:
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    llm._loop.submit([submission], outputs.put)
    got = [outputs.get(timeout=60)]
    while got[-1].finish_reason is None:
        got.append(outputs.get(timeout=60))
    return got


def token_ids(outputs: list[StepOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("num_made", [1, 7, 23])
def test_the_rest_of_the_answer_is_the_same(llm: LLM, kind: str, num_made: int) -> None:
    whole = Submission("whole", PROMPT, PARAMS[kind], seed=5)
    expected = finish(llm, whole)
    made = token_ids(expected)[:num_made]
    resumed = finish(llm, replace(whole, request_id="rest", output_token_ids=tuple(made)))
    assert made + token_ids(resumed) == token_ids(expected)
    assert resumed[-1].finish_reason == expected[-1].finish_reason
    assert [o.prompt_logprobs for o in resumed] == [None] * len(resumed)  # they came before
    ranks = [[p.rank for p in o.logprobs] for o in expected[num_made:]]
    assert [[p.rank for p in o.logprobs] for o in resumed] == ranks
