"""LLM as users of vLLM type it: prompts, params, outputs, streams, options."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
from quire import LLM, Logprob, SamplingParams
from quire.engine.errors import ConfigError, RequestError

from .engines import start

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start("llama32_tied", max_logprobs=20) as llm:
        yield llm


def one(llm: LLM, prompt: Any, params: SamplingParams = GREEDY) -> Any:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return output.outputs[0]


def test_prompts_in_every_form_give_the_same_answer(llm: LLM) -> None:
    ids = llm.tokenize("Hello, world!")
    forms = ["Hello, world!", ids, {"prompt": "Hello, world!"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["Hello, world!", None, "Hello, world!", None]
    assert all(o.prompt_token_ids == ids and o.finished for o in outputs)
    assert one(llm, ids).text == outputs[0].outputs[0].text
    assert llm.detokenize(ids) == "Hello, world!"


def test_params_one_for_all_or_one_each(llm: LLM) -> None:
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5)]
    outputs = llm.generate(["a", "b"], each, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 5]
    with pytest.raises(RequestError, match="2 prompts and 1 sampling_params; give one for all"):
        llm.generate(["a", "b"], each[:1])


def test_n_answers_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, n=4, seed=5, max_tokens=6, ignore_eos=True)
    first, second = llm.generate(["Hi", "Hi"], params, use_tqdm=False)
    answers = [a.token_ids for a in first.outputs]
    assert [a.index for a in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(a) for a in answers}) == 4
    assert answers == [a.token_ids for a in second.outputs]
    free = SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True)
    a, b = llm.generate(["Hi", "Hi"], free, use_tqdm=False)
    assert a.outputs[0].token_ids != b.outputs[0].token_ids


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    (output,) = llm.generate("Hello, world!", params, use_tqdm=False)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, position in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert position is not None
        assert next(iter(position)) == token_id
        assert 1 in {p.rank for p in position.values()}
    for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True):
        assert isinstance(position[token_id], Logprob)
        assert position[token_id].rank == 1
        assert len(position) == 2
        assert position[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
    total = sum(p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob is not None
    assert math.isclose(total, answer.cumulative_logprob, rel_tol=1e-6)


def test_stop_strings_end_the_text_and_name_themselves(llm: LLM) -> None:
    whole = one(llm, "Hello", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    stop = whole.text[10:13]
    cut = whole.text.index(stop)
    params = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "stop": [stop]}
    answer = one(llm, "Hello", SamplingParams(**params))
    assert (answer.text, answer.finish_reason) == (whole.text[:cut], "stop")
    assert answer.stop_reason == stop
    assert len(answer.token_ids) < 30
    kept = one(llm, "Hello", SamplingParams(**params, include_stop_str_in_output=True))
    assert kept.text == whole.text[: cut + len(stop)]
    late = one(llm, "Hello", SamplingParams(**params, min_tokens=30))
    assert late.text == whole.text


def test_stop_tokens_bad_words_bias_and_allowed_ids(llm: LLM) -> None:
    base = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    free = one(llm, "Hello", SamplingParams(**base))
    third = free.token_ids[2]
    stopped = one(llm, "Hello", SamplingParams(**base, stop_token_ids=[third]))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(third) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    later = one(llm, "Hello", SamplingParams(**base, stop_token_ids=[third], min_tokens=8))
    assert third not in later.token_ids[:8]
    allowed = one(llm, "Hello", SamplingParams(**base, allowed_token_ids=[40, 41]))
    assert set(allowed.token_ids) <= {40, 41}
    biased = one(llm, "Hello", SamplingParams(**base, logit_bias={300: 100.0}))
    assert set(biased.token_ids) == {300}
    banned = one(llm, "Hello", SamplingParams(**base, logit_bias={free.token_ids[0]: -100.0}))
    assert free.token_ids[0] not in banned.token_ids


def test_bad_words_of_several_tokens_never_appear(llm: LLM) -> None:
    base = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    free = one(llm, [50, 60, 70], SamplingParams(**base))
    words = [llm.detokenize(free.token_ids[i : i + 2]) for i in (1, 5, 9)]
    usable = [w for w in words if "\ufffd" not in w and len(llm.tokenize(w)) > 1]
    assert usable
    answer = one(llm, [50, 60, 70], SamplingParams(**base, bad_words=usable))
    for word in usable:
        ids = llm.tokenize(word)
        pairs = [answer.token_ids[i : i + len(ids)] for i in range(len(answer.token_ids))]
        assert ids not in pairs


def test_end_of_sequence_ends_unless_ignored() -> None:
    with start("llama32_tied") as llm:
        eos = llm.get_tokenizer().eos_token_id
        assert eos is not None
        bias = {"temperature": 0.0, "max_tokens": 4, "logit_bias": {eos: 100.0}}
        ended = one(llm, "Hello", SamplingParams(**bias))
        assert (ended.token_ids, ended.text) == ([eos], "")
        assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
        assert one(llm, "Hello", SamplingParams(**bias, ignore_eos=True)).token_ids == [eos] * 4
        late = one(llm, "Hello", SamplingParams(**bias, min_tokens=2))
        assert late.token_ids.index(eos) == 2


def test_answer_ends_at_the_context(llm: LLM) -> None:
    prompt = list(range(3, 13))
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with start("llama32_tied", max_model_len=32) as small:
        answer = one(small, prompt, params)
        assert (len(answer.token_ids), answer.finish_reason) == (22, "length")
        with pytest.raises(RequestError, match="prompt has 32 tokens, but the context is 32"):
            small.generate([list(range(3, 35))], params)


def test_stream_gives_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, stop=["zq"], logprobs=1)
    whole = one(llm, "Tell me", params)
    deltas = list(llm.stream("Tell me", params))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas][-1] == whole.finish_reason
    assert all(d.finish_reason is None for d in deltas[:-1])
    assert [p for d in deltas for p in d.logprobs or ()] == whole.logprobs


def test_works_inside_a_running_event_loop(llm: LLM) -> None:
    async def both() -> tuple[str, list[str]]:
        text = one(llm, "Tell me").text  # the blocking call
        streams = [llm.stream("Tell me", GREEDY) for _ in range(3)]

        async def join(stream: Any) -> str:
            return "".join([delta.text async for delta in stream])

        return text, list(await asyncio.gather(*(join(s) for s in streams)))

    text, streamed = asyncio.run(both())
    assert streamed == [text] * 3


def test_chat_renders_the_template_once_or_for_many(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    (answer,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    rendered = llm.get_tokenizer().apply_chat_template(conversation)
    assert answer.prompt_token_ids == llm.tokenize(rendered, add_special_tokens=False)
    pair = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert [o.outputs[0].text for o in pair] == [answer.outputs[0].text] * 2
    (open_ended,) = llm.chat(conversation, GREEDY, add_generation_prompt=False, use_tqdm=False)
    assert len(open_ended.prompt_token_ids) < len(answer.prompt_token_ids)
    (shouted,) = llm.chat(
        conversation,
        GREEDY,
        chat_template="{{ who }}: {{ messages[0].content }}",
        chat_template_kwargs={"who": "me"},
        use_tqdm=False,
    )
    assert shouted.prompt == "me: Hello"


def test_cached_tokens_are_reported(llm: LLM) -> None:
    prompt = [3, 1, 4, 1, 5] * 10
    first = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    again = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 48)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids


def test_every_prompt_is_checked_before_any_runs(llm: LLM) -> None:
    steps = llm._engine.core.metrics.num_steps
    with pytest.raises(RequestError, match=r"prompt_token_ids\[0\] is 512"):
        llm.generate([[5], [512]], GREEDY)
    with pytest.raises(RequestError, match="or a list of them, got dict"):
        llm.generate("a", {"temperature": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"logprobs is 21.* at most 20"):
        llm.generate("a", SamplingParams(logprobs=21))
    assert llm._engine.core.metrics.num_steps == steps


def test_options_of_vllm_are_mapped_idle_or_refused() -> None:
    with (
        pytest.warns(UserWarning, match="without effect here: swap_space"),
        start("llama32_tied", block_size=16, swap_space=4, gpu_memory_utilization=0.5) as llm,
    ):
        assert llm._engine.core.scheduler.config.page_size == 16
    with pytest.raises(ConfigError, match="quantization = 'awq' is not available"):
        LLM(quantization="awq")
    with pytest.raises(ConfigError, match="unknown option 'max_model_length'; did you mean max_mo"):
        LLM(max_model_length=5)
    with pytest.raises(ConfigError, match="size = 2 needs as many devices and there is 1"):
        LLM(tensor_parallel_size=2)
