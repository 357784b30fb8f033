"""The text-level check: what a prompt may be, and what needs a tokenizer."""

import numpy as np
import pytest
from quire.engine.errors import RequestError
from quire.engine.sampling_params import SamplingParams
from quire.engine.text.validate import check_text_request

DEFAULT = SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("Hi", "Hi", None),
        ({"prompt": "Hi"}, "Hi", None),
        ([1, 2], None, (1, 2)),
        ((1, 2), None, (1, 2)),
        (np.array([1, 2]), None, (1, 2)),
        ([np.int64(1), 2], None, (1, 2)),
        ({"prompt_token_ids": [1, 2]}, None, (1, 2)),
        ({"prompt": "Hi", "prompt_token_ids": [1, 2]}, "Hi", (1, 2)),
    ],
    ids=str,
)
def test_text_request_normalises_prompts(tokenizer_named, prompt, text, ids):
    tokenizer = tokenizer_named("llama2_mha")
    request = check_text_request(prompt, DEFAULT, tokenizer, max_model_len=512)
    assert request.prompt == text
    assert request.prompt_token_ids == (ids or tuple(tokenizer.encode("Hi")))
    assert {type(i) for i in request.prompt_token_ids} == {int}


def test_text_request_of_a_rendered_chat_adds_no_special_tokens(tokenizer_named):
    tokenizer = tokenizer_named("llama2_mha")
    request = check_text_request(
        "<s>Hi", DEFAULT, tokenizer, add_special_tokens=False, max_model_len=512
    )
    assert request.prompt_token_ids.count(tokenizer.bos_token_id) == 1


def test_text_request_empty_prompt_needs_a_beginning_of_sequence(tokenizer_named):
    request = check_text_request("", DEFAULT, tokenizer_named("llama2_mha"), max_model_len=512)
    assert request.prompt_token_ids == (0,)
    with pytest.raises(
        RequestError, match=r"prompt is empty, and this tokenizer adds no .*send some"
    ):
        check_text_request("", DEFAULT, tokenizer_named("qwen3"), max_model_len=512)


@pytest.mark.parametrize(
    ("prompt", "field", "message"),
    [
        (None, "prompt", r"must be a string or a list of token ids, got NoneType"),
        (b"Hi", "prompt", r"must be a string or a list of token ids, got bytes"),
        (3, "prompt", r"got int"),
        ([], "prompt", r"prompt is empty, so there is nothing to continue"),
        (["Hi"], "prompt", r"is a list of strings, but this is one prompt; send each text"),
        ([1, True], "prompt", r"prompt\[1\] must be a token id, got True"),
        ([1, 2.0], "prompt", r"prompt\[1\] must be a token id, got 2\.0"),
        ({}, "prompt", r"needs prompt or prompt_token_ids, it has neither"),
        (
            {"prompt": [1]},
            "prompt",
            r"must be a string, got list; token ids go into prompt_token_ids",
        ),
        ({"prompt_token_ids": "Hi x"}, "prompt_token_ids", r"is a list of strings|must be"),
        ({"prompt_token_ids": []}, "prompt_token_ids", r"prompt_token_ids is empty"),
        (
            {"prompt": "x", "multi_modal_data": {}},
            "multi_modal_data",
            r"is not honoured; a prompt dict",
        ),
        ("half \ud83d", "prompt", r"half of a surrogate pair at character 5.*decode it properly"),
    ],
)
def test_text_request_refuses_other_prompts(tokenizer_named, prompt, field, message):
    with pytest.raises(RequestError, match=message) as caught:
        check_text_request(prompt, DEFAULT, tokenizer_named("qwen3"), max_model_len=512)
    assert caught.value.field == field


def test_text_request_stop_strings_need_text(tokenizer_named):
    params = SamplingParams(stop="x", detokenize=False)
    with pytest.raises(
        RequestError, match="detokenize is False; set detokenize=True or use stop_tok"
    ):
        check_text_request("Hi", params, tokenizer_named("qwen3"), max_model_len=512)


def test_text_request_encodes_bad_words_with_and_without_a_space(tekken):
    request = check_text_request(
        "Hi", SamplingParams(bad_words=["cat", " cat"]), tekken, max_model_len=512
    )
    assert set(request.bad_word_ids) == {
        tuple(tekken.encode("cat")),
        tuple(tekken.encode(" cat")),
    }
    assert len(request.bad_word_ids) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["한" * 500], r"bad_words make \d+ tokens with and without .* at most 1024 are allowed"),
        (["x", "\ud83d"], r"bad_words\[1\] has half of a surrogate pair"),
    ],
)
def test_text_request_refuses_bad_words(tokenizer_named, words, message):
    with pytest.raises(RequestError, match=message) as caught:
        check_text_request(
            "Hi", SamplingParams(bad_words=words), tokenizer_named("qwen3"), max_model_len=512
        )
    assert caught.value.field == "bad_words"


def test_text_request_refuses_bad_words_without_tokens(tokenizer_named):
    class NoTokens:
        most_characters = 1

        def encode(self, text, add_special_tokens=True):
            return [1] if add_special_tokens else []

    with pytest.raises(
        RequestError, match=r"bad_words\[0\] is 'x', which .* no tokens; leave it out"
    ):
        check_text_request("Hi", SamplingParams(bad_words=["x"]), NoTokens(), max_model_len=512)


def test_a_hopelessly_long_text_is_refused_before_it_is_encoded(tokenizer_named):
    tokenizer = tokenizer_named("qwen3")
    longest = tokenizer.most_characters
    assert longest == max(len(t) for t in tokenizer.backend.get_vocab(with_added_tokens=True))
    text = "a" * (4 * 8 * longest)
    assert check_text_request(text, DEFAULT, tokenizer, max_model_len=8).prompt == text
    with pytest.raises(RequestError, match="cannot be 8 tokens or fewer"):
        check_text_request(text + "a", DEFAULT, tokenizer, max_model_len=8)
