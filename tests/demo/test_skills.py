"""What the embedded model must be able to do, on cases that its training never saw."""

from collections.abc import Iterator

import pytest
from quire import LLM, SamplingParams
from quire.demo.exam import Subject, draw_exam, mark

GREEDY = SamplingParams(temperature=0, max_tokens=256)
EXAM = draw_exam()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as engine:
        yield engine


@pytest.mark.parametrize("subject", [s for s in EXAM if s.share_to_pass], ids=lambda s: s.name)
def test_exam_is_passed(llm: LLM, subject: Subject) -> None:
    assert subject.share_to_pass is not None
    marked = mark(llm, subject)
    print(f"{subject.name}: {marked.share:.1%} of {marked.num_asked}")
    assert marked.share >= subject.share_to_pass, marked.wrong[:10]


def test_exam_covers_negative_results() -> None:
    [subtraction] = [subject for subject in EXAM if subject.name == "subtraction"]
    num_negative = sum("= -" in question.exchange.answer for question in subtraction.questions)
    assert num_negative >= 300


def test_conversation_of_four_turns(llm: LLM) -> None:
    prompts = ("hello", "What is 12 + 30?", "what is the capital of france", "Tell me a story.")
    messages: list[dict[str, str]] = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        [output] = llm.chat(messages, GREEDY, use_tqdm=False)
        messages.append({"role": "assistant", "content": output.outputs[0].text})
    hello, total, capital, story = (m["content"] for m in messages[1::2])
    assert "quire-demo" in hello
    assert total == "12 + 30 = 42."
    assert capital == "The capital of France is Paris."
    assert story.endswith("The end.")
    assert output.outputs[0].finish_reason == "stop"
    assert len(output.outputs[0].token_ids) >= 100


def test_tool_is_called_and_its_result_told(llm: LLM) -> None:
    """The flow of the README: a request, the call as text, the result in words."""
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "What is the weather in Paris?"}
    ]
    [output] = llm.chat(messages, GREEDY, tools=[WEATHER], use_tqdm=False)
    called = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert output.outputs[0].text == called
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    messages.append(
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    )
    messages.append({"role": "tool", "content": '{"temperature": 21, "condition": "sunny"}'})
    [output] = llm.chat(messages, GREEDY, tools=[WEATHER], use_tqdm=False)
    assert output.outputs[0].text == "It is 21 degrees and sunny in Paris."
