"""The answers are those of the reference implementation, family by family, through LLM."""

import numpy as np
import pytest
from quire import SamplingParams

from .engines import FAMILIES, Comparison, log_softmax, prompt_logprobs, reference, start

# float32: what a different order of summation may cost, with room (1e-5 is seen).
F32_TOLERANCE = 2e-4
ALL = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_and_greedy_tokens_equal_the_reference(family: str) -> None:
    data = reference(family)
    prompts = [data[f"prompt_{i}"].tolist() for i in range(4)]
    with start(family) as llm:
        scored = llm.generate(prompts[:2], ALL, use_tqdm=False)
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
    for i, output in enumerate(scored):
        expected = log_softmax(data[f"logits_{i}"])
        np.testing.assert_allclose(
            prompt_logprobs(output), expected[:-1], atol=F32_TOLERANCE, rtol=0
        )
        (last,) = output.outputs[0].logprobs or ()
        got = np.array([last[t].logprob for t in range(len(last))])
        np.testing.assert_allclose(got, expected[-1], atol=F32_TOLERANCE, rtol=0)
    comparison = Comparison()
    for i, output in enumerate(answers):
        margins = data[f"greedy_margin_{i}"].tolist()
        comparison.add(data[f"greedy_{i}"].tolist(), output.outputs[0].token_ids, margins)
    print(f"{family}: {comparison.share:.1%} of {comparison.num_steps} greedy steps compared")
    assert comparison.share >= 0.95


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_do_not_depend_on_the_chunks_of_the_prompt(family: str, chunk: int) -> None:
    """One token at a time, and seven: windows, ropes and page borders at every offset."""
    data = reference(family)
    with start(family, max_num_batched_tokens=8, token_buckets=(8,), max_num_seqs=1) as llm:
        llm._engine.core.scheduler._max_count = chunk
        (output,) = llm.generate([data["prompt_1"].tolist()], ALL, use_tqdm=False)
    expected = log_softmax(data["logits_1"])[:-1]
    np.testing.assert_allclose(prompt_logprobs(output), expected, atol=F32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_close_to_the_reference(family: str) -> None:
    data = reference(family)
    with start(family, dtype="bfloat16") as llm:
        outputs = llm.generate([data[f"prompt_{i}"].tolist() for i in (0, 1)], ALL, use_tqdm=False)
    errors = []
    for i, output in enumerate(outputs):
        expected = log_softmax(data[f"logits_{i}"])[:-1]
        errors.append(np.abs(prompt_logprobs(output) - expected).ravel())
    error = np.concatenate(errors) / data["logits_1"].std()
    print(f"{family}: mean {error.mean():.2%}, max {error.max():.2%} of the logits' std")
    assert error.mean() <= 0.01
    assert error.max() <= 0.06
