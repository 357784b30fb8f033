"""The token-level check: ids against the logits width, lengths against the context."""

import pytest
from quire.engine.errors import RequestError
from quire.engine.sampling_params import SamplingParams
from quire.engine.token_checks import TokenLimits, check_token_request

LIMITS = TokenLimits(logits_width=100, max_model_len=10, max_logprobs=20)


@pytest.mark.parametrize(("given", "resolved"), [(None, 7), (3, 3), (7, 7), (8, 7), (10**12, 7)])
def test_token_checks_resolve_max_tokens_to_the_rest_of_the_context(given, resolved):
    params = check_token_request([1, 2, 3], SamplingParams(max_tokens=given, seed=5), LIMITS)
    assert (params.max_tokens, params.seed) == (resolved, 5)


def test_token_checks_leave_params_that_fit_as_they_are():
    params = SamplingParams(max_tokens=3, min_tokens=2)
    assert check_token_request((0, 99), params, LIMITS) is params


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"prompt has no tokens.*send at least one token"),
        ("text", r"must be a list of token ids, got str"),
        (None, r"must be a list of token ids, got NoneType"),
        ([1, 100], r"prompt_token_ids\[1\] is 100, but this model's token ids are 0 to 99"),
        ([1, 2, -1], r"prompt_token_ids\[2\] is -1, but this model's token ids are 0 to 99"),
        ([1, True], r"prompt_token_ids\[1\] must be an int, got True of type bool"),
        ([1, 2.0], r"prompt_token_ids\[1\] must be an int, got 2\.0 of type float; convert it"),
        ([1] * 10, r"prompt has 10 tokens, but the context is 10.*shorten the prompt to 9 tokens"),
    ],
)
def test_token_checks_refuse_prompts(prompt, message):
    with pytest.raises(RequestError, match=message) as caught:
        check_token_request(prompt, SamplingParams(), LIMITS)
    assert caught.value.field == "prompt_token_ids"


def test_token_checks_accept_the_longest_prompt():
    assert check_token_request([1] * 9, SamplingParams(), LIMITS).max_tokens == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop_token_ids", [100], r"stop_token_ids has the token id 100, .* 0 to 99; leave it out"),
        ("logit_bias", {5: 1.0, 100: 2}, r"logit_bias has the token id 100"),
        ("allowed_token_ids", [99, 300], r"allowed_token_ids has the token id 300"),
        ("logprobs", 21, r"logprobs is 21, but this engine gives at most 20; ask for fewer"),
        ("prompt_logprobs", 21, r"prompt_logprobs is 21, .*larger max_logprobs"),
        ("logprobs", -1, r"logprobs=-1 asks for all tokens.*start the engine with max_logprobs=-1"),
        (
            "min_tokens",
            8,
            r"min_tokens is 8, but a prompt of 3 tokens leaves room for 7 in the con",
        ),
    ],
)
def test_token_checks_refuse_fields(field, value, message):
    params = SamplingParams(max_tokens=None, **{field: value})
    with pytest.raises(RequestError, match=message) as caught:
        check_token_request([1, 2, 3], params, LIMITS)
    assert caught.value.field == field


@pytest.mark.parametrize("unlimited", [-1, None])
def test_token_checks_unlimited_logprobs(unlimited):
    limits = TokenLimits(logits_width=100, max_model_len=10, max_logprobs=unlimited)
    params = SamplingParams(logprobs=-1, prompt_logprobs=1000, max_tokens=1)
    assert check_token_request([1], params, limits) is params


def test_token_checks_find_the_first_bad_id_in_a_long_prompt():
    limits = TokenLimits(logits_width=100, max_model_len=2_000_000)
    with pytest.raises(RequestError, match=r"prompt_token_ids\[999999\] is 100"):
        check_token_request([5] * 999_999 + [100], SamplingParams(), limits)
