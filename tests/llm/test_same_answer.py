"""An answer depends on nothing but its request: not on its batch, pages, chunks or luck."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from quire import LLM, RequestOutput, SamplingParams
from quire.cpu_kernels.library import Library
from quire.layers import sampling
from quire.pallas_kernels.registry import cpu_library

from .engines import Comparison, start
from .hostile import make_hostile
from .margins import margin

FAMILY = "llama31_scaled_rope"
NUM_TOKENS = 24
NUM_OTHERS = 32


def prompts() -> list[list[int]]:
    """Every length matters at some page or chunk border; some share a beginning."""
    rng = np.random.default_rng(7)
    lengths = (1, 3, 15, 16, 17, 33, 40, 64)
    alone = [rng.integers(3, 512, n).tolist() for n in lengths]
    return [*alone, alone[-1][:48] + alone[2], alone[-1][:32]]


def params(index: int) -> SamplingParams:
    """Greedy, and several kinds of drawing, each with its seed."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 0.8, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    ]
    return SamplingParams(
        **kinds[index % len(kinds)], seed=index, max_tokens=NUM_TOKENS, ignore_eos=True
    )


def requests() -> list[tuple[list[int], SamplingParams]]:
    return [(p, params(i + k)) for i, p in enumerate(prompts()) for k in range(4)]


def others() -> list[tuple[list[int], SamplingParams]]:
    rng = np.random.default_rng(11)
    return [
        (rng.integers(3, 512, int(rng.integers(1, 60))).tolist(), params(i))
        for i in range(NUM_OTHERS)
    ]


def run(llm: LLM, cases: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    return llm.generate([p for p, _ in cases], [s for _, s in cases], use_tqdm=False)


@cache
def expected(family: str, dtype: str) -> list[tuple[list[int], list[float]]]:
    """Tokens and decision margins of each request alone, in order."""
    result = []
    with start(family, dtype=dtype, enable_prefix_caching=False) as llm:
        for prompt, p in requests():
            wanted = SamplingParams(
                **{k: getattr(p, k) for k in ("temperature", "top_p", "top_k", "min_p", "seed")},
                presence_penalty=p.presence_penalty,
                repetition_penalty=p.repetition_penalty,
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                logprobs=-1,
            )
            answer = llm.generate([prompt], wanted, use_tqdm=False)[0].outputs[0]
            tokens = answer.token_ids
            logits = [
                np.array([p[t].logprob for t in range(len(p))]) for p in answer.logprobs or ()
            ]
            margins = [margin(row, tokens[:i], tokens[i], wanted) for i, row in enumerate(logits)]
            result.append((tokens, margins))
    return result


def check_same(outputs: list[RequestOutput], family: str = FAMILY, dtype: str = "float32") -> None:
    """To the last token with the C++ kernels; XLA's ops round otherwise for other shapes, so there
    a decision that was too close to call may fall otherwise.
    """
    if isinstance(cpu_library(), Library):
        got = [output.outputs[0].token_ids for output in outputs]
        assert got == [tokens for tokens, _ in expected(family, dtype)]
        return
    comparison = Comparison()
    for output, (tokens, margins) in zip(outputs, expected(family, dtype), strict=True):
        comparison.add(tokens, output.outputs[0].token_ids, margins)
    print(f"{comparison.share:.2%} of {comparison.num_steps} steps compared")
    assert comparison.share >= 0.95


VARIANTS: dict[str, dict[str, Any]] = {
    "page size 4": {"page_size": 4},
    "page size 64": {"page_size": 64},
    "budget 16": {"max_num_batched_tokens": 16, "token_buckets": (16,)},
    "budget 256": {"max_num_batched_tokens": 256, "token_buckets": (8, 32, 64, 256)},
    "budget 2048": {"max_num_batched_tokens": 2048, "token_buckets": (64, 2048)},
    "five rows": {"max_num_seqs": 5},
    "one row": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_answer_does_not_depend_on_pages_and_budgets(name: str) -> None:
    with start(FAMILY, **VARIANTS[name]) as llm:
        check_same(run(llm, requests()))


@pytest.mark.parametrize("family", [FAMILY, "mistral_sliding", "qwen2_mixed_windows"])
def test_answer_does_not_depend_on_the_others_in_the_batch(family: str) -> None:
    cases = requests()
    with start(family) as llm:
        outputs = run(llm, [*others(), *cases, *others()])
        check_same(outputs[NUM_OTHERS : NUM_OTHERS + len(cases)], family)


def test_answer_does_not_depend_on_prefix_hits() -> None:
    with start(FAMILY, page_size=4) as llm:
        run(llm, requests())
        outputs = run(llm, requests())
        assert sum(o.num_cached_tokens for o in outputs) > 1000
        check_same(outputs)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_answer_does_not_depend_on_chunks(chunk: int) -> None:
    with start(FAMILY) as llm:
        llm._engine.core.scheduler._max_count = chunk
        check_same(run(llm, requests()))


def test_answer_survives_preemption() -> None:
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4  # layers, k and v, heads, positions, columns, float32
    with start(
        FAMILY,
        kv_cache_memory_bytes=40 * page_bytes,
        max_model_len=128,
        enable_prefix_caching=False,
    ) as llm:
        outputs = run(llm, requests())
        assert llm._engine.core.scheduler.num_preemptions > 5
        check_same(outputs)


@pytest.mark.parametrize("family", [FAMILY, "mistral_sliding", "qwen2_mixed_windows"])
def test_answer_does_not_depend_on_what_others_left_in_memory(family: str) -> None:
    """NaN in every byte that a request does not own, garbage in idle rows and dispatched arrays."""
    with start(family, max_num_seqs=7, kv_cache_memory_bytes=1 << 20, max_model_len=128) as llm:
        make_hostile(llm)
        check_same(run(llm, requests()), family)


@pytest.mark.parametrize("family", [FAMILY, "llama2_mha", "qwen3"])
def test_bfloat16_answer_is_the_same_to_the_last_bit(family: str) -> None:
    """Logprobs too: no order of summation depends on the batch, the bucket or the chunks."""
    cases = [
        (p, SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True))
        for p in prompts()
    ]
    variants: list[dict[str, Any]] = [
        {"max_num_seqs": 1, "enable_prefix_caching": False},
        {},
        {"max_num_batched_tokens": 16, "token_buckets": (2, 16)},
        {"max_num_batched_tokens": 256, "token_buckets": (8, 32, 256)},
    ]
    answers = []
    for options in variants:
        with start(family, dtype="bfloat16", **options) as llm:
            outputs = run(llm, cases)
        answers.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
    assert answers[1:] == answers[:1] * 3


@pytest.mark.skipif(not isinstance(cpu_library(), Library), reason="of the C++ kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [FAMILY, "qwen2_mixed_windows"])
def test_logprobs_are_the_same_to_the_last_bit_in_any_company(family: str, dtype: str) -> None:
    """Of the output and of the prompt, drawn and greedy, alone and among others."""
    cases = [
        (prompt, dataclasses.replace(p, max_tokens=6, logprobs=4, prompt_logprobs=2))
        for prompt, p in requests()
    ]

    def told(outputs: list[RequestOutput]) -> list[Any]:
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs]

    with start(family, dtype=dtype, enable_prefix_caching=False) as llm:
        alone = [told(run(llm, [case]))[0] for case in cases]
        together = run(llm, [*others(), *cases, *others()])
    assert told(together[NUM_OTHERS : NUM_OTHERS + len(cases)]) == alone


@pytest.mark.skipif(not isinstance(cpu_library(), Library), reason="of the C++ kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [FAMILY, "qwen2_mixed_windows"])
def test_a_token_is_scored_in_the_prompt_as_behind_it(family: str, dtype: str) -> None:
    """The hidden states of a prompt are made by other calls of the last layer than those that are
    sampled.
    """
    prompt = max(prompts(), key=len)
    wanted = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=2)
    with start(family, dtype=dtype, enable_prefix_caching=False) as llm:
        (whole,) = run(llm, [(prompt, wanted)])
        assert whole.prompt_logprobs is not None
        for at in (1, 17, 40, len(prompt) - 1):
            (beginning,) = run(
                llm, [(prompt[:at], dataclasses.replace(wanted, prompt_logprobs=None))]
            )
            behind, inside = beginning.outputs[0].logprobs, whole.prompt_logprobs[at]
            assert behind is not None
            assert inside is not None
            assert {t: behind[0][t].logprob for t in inside} == {
                t: inside[t].logprob for t in inside
            }


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    expected.cache_clear()


@pytest.mark.skipif(not isinstance(cpu_library(), Library), reason="of the C++ kernels")
def test_few_of_the_logits_are_read_until_a_row_needs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens from all logits are made 0, so that it shows where they come from. That both ways give
    the same ones is seen above: alone such a row takes the one, among the others the other.
    """
    choose = sampling.choose

    def zeros(*args: Any) -> Any:
        token, is_bad = choose(*args)
        return token * 0, is_bad

    few = [
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "logprobs": 2},
        {"temperature": 0.7, "top_k": 64, "min_p": 0.02},
        {"temperature": 0},
    ]
    whole = [
        {"top_p": 0.9},
        {"top_k": 65},
        {"top_k": 5, "presence_penalty": 1.0},
        {"top_k": 5, "allowed_token_ids": [3, 4, 5]},
        {"temperature": 0, "logit_bias": {3: -1.0}},
    ]

    def tokens(llm: LLM, kinds: list[dict[str, Any]]) -> list[list[int]]:
        cases = [
            ([5, 6, 7], SamplingParams(**k, seed=3, max_tokens=4, ignore_eos=True)) for k in kinds
        ]
        return [o.outputs[0].token_ids for o in run(llm, cases)]

    with start(FAMILY, enable_prefix_caching=False) as llm:
        right = tokens(llm, few)
    monkeypatch.setattr(sampling, "choose", zeros)
    with start(FAMILY, enable_prefix_caching=False) as llm:
        assert tokens(llm, few) == right
        assert tokens(llm, few[:1]) == right[:1]
        for kind in whole:
            assert tokens(llm, [kind]) == [[0] * 4], kind
            assert tokens(llm, [few[0], kind])[0] == [0] * 4
