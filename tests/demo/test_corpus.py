"""What the embedded model was trained on, and that what is examined is not in it."""

import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from random import Random

import pytest
import tokenizers
from quire.demo.batches import draw_conversations, step_rng
from quire.demo.corpus import draw_conversation
from quire.demo.exam import Question, draw_exam
from quire.demo.exchange import Conversation
from quire.demo.export import ASSETS
from quire.demo.rendering import pieces_of
from quire.demo.settings import TrainingSettings
from quire.demo.tokenizer import TOOL_TOKENS, encode_conversations, texts_to_learn_from
from quire.engine.errors import RequestError
from quire.engine.text.tokenizer import Tokenizer
from safetensors.numpy import load_file

SETTINGS = TrainingSettings()  # as trained; demo/README.md
ROOM = SETTINGS.num_rows * SETTINGS.row_tokens


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(ASSETS)


@cache
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


def held_out_questions() -> list[Question]:
    return [q for subject in draw_exam() if subject.is_held_out for q in subject.questions]


def drawn_for_step(step: int) -> list[Conversation]:
    """At least what the step drew: the second time is rarely needed, a third never."""
    rng = step_rng(SETTINGS.seed, step)
    return [*draw_conversations(rng), *draw_conversations(rng)]


def num_fitting_tokens(conversations: list[Conversation]) -> int:
    encoded = encode_conversations(backend(), conversations)
    sizes = [len(e.token_ids) for e in encoded]
    return sum(size for size in sizes if size <= SETTINGS.row_tokens)


def plain(prompt: str) -> str:
    """However carelessly typed; "Wolf" and "wolf" to search for are two cases."""
    return prompt[0].lower() + prompt[1:].rstrip(".?!")


def letters(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def words_of(conversation: Conversation) -> Iterator[str]:
    for exchange in conversation.exchanges:
        yield from letters(exchange.prompt)
        yield from letters(exchange.answer)
        if exchange.call is not None:
            yield from letters(exchange.call.text())
            yield from letters(exchange.call.result)
    for tool in conversation.tools:
        yield from letters(json.dumps(tool))


def test_training_shows_nothing_that_is_examined() -> None:
    """By case, by prompt and by word, over every conversation that the training run drew."""
    questions = held_out_questions()
    cases = {q.exchange.case for q in questions if q.exchange.case is not None}
    prompts = {plain(q.prompt) for q in questions}
    [repeat] = [s for s in draw_exam() if s.name == "repeat unseen words"]
    words = set(itertools.chain(*(letters(q.exchange.answer) for q in repeat.questions)))
    assert len(cases) > 1000
    assert len(words) > 300
    for step in range(SETTINGS.num_steps):
        for conversation in drawn_for_step(step):
            assert words.isdisjoint(words_of(conversation))
            for exchange in conversation.exchanges:
                assert exchange.case not in cases
                assert plain(exchange.prompt) not in prompts


def test_two_draws_fill_a_step() -> None:
    """What the test above relies on; sampled, since it needs the tokens."""
    for step in range(0, SETTINGS.num_steps, 50):
        assert num_fitting_tokens(drawn_for_step(step)) > 1.5 * ROOM


def test_tokenizer_learnt_from_no_examined_words() -> None:
    [repeat] = [s for s in draw_exam() if s.name == "repeat unseen words"]
    words = set(itertools.chain(*(letters(q.exchange.answer) for q in repeat.questions)))
    for text in texts_to_learn_from(SETTINGS.seed):
        assert words.isdisjoint(letters(text))


def test_chat_template_renders_as_training_does() -> None:
    rng = Random("render")
    for _ in range(300):
        conversation = draw_conversation(rng)
        served = tokenizer().apply_chat_template(
            conversation.messages(), tools=conversation.tools, add_generation_prompt=False
        )
        assert served == "".join(text for text, _ in pieces_of(conversation)) + "\n"
        [encoded] = encode_conversations(backend(), [conversation])
        newline = tokenizer().encode("\n")
        assert encoded.token_ids + newline == tokenizer().encode(served, add_special_tokens=False)


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_chat_template_takes_arguments_as_object_and_as_text(arguments: object) -> None:
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    text = tokenizer().apply_chat_template(
        [{"role": "assistant", "content": "Wait.", "tool_calls": [call, call]}],
        add_generation_prompt=False,
    )
    called = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert text == f"<|im_start|>assistant\nWait.\n{called}\n{called}<|im_end|>\n"


def test_chat_template_puts_system_message_and_tools_into_one_turn() -> None:
    function = {"name": "now", "parameters": {}}
    text = tokenizer().apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": function}],
    )
    assert text == (
        '<|im_start|>system\nBe brief.\n\nTools:\n{"name": "now", "parameters": {}}<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_refuses_other_roles() -> None:
    with pytest.raises(RequestError, match="system, user, assistant and tool, not narrator"):
        tokenizer().apply_chat_template([{"role": "narrator", "content": "Once"}])


def test_digits_are_single_tokens() -> None:
    assert all(len(tokenizer().encode(str(n))) == len(str(n)) for n in range(1000))
    with_digits = [t for t in backend().get_vocab() if re.search(r"\d", t)]
    assert all(len(token) == 1 for token in with_digits)


def test_made_up_word_has_the_same_tokens_after_a_space() -> None:
    for word in ("zukidi", "Brolank", "qpwx"):
        space, *after_space = backend().encode(f" {word}").tokens
        assert (space, after_space) == ("Ġ", backend().encode(word).tokens)


def test_tool_tags_are_single_tokens_that_stay_in_the_text() -> None:
    for tag in TOOL_TOKENS:
        [token_id] = tokenizer().encode(tag)
        assert tokenizer().decode([token_id], skip_special_tokens=True) == tag


def test_model_is_within_its_limits() -> None:
    file = ASSETS / "model.safetensors"
    config = json.loads((ASSETS / "config.json").read_text())
    assert file.stat().st_size <= 8_000_000
    assert sum(tensor.size for tensor in load_file(file).values()) <= 4_000_000
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] <= 6
    assert config["vocab_size"] == tokenizer().vocab_size <= 2048
