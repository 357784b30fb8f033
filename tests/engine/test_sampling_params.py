"""Sampling parameters: vLLM's names and defaults, and a message for everything else."""

import copy
import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from quire.engine.errors import RequestError
from quire.engine.sampling_params import SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "max_tokens": 16,
    "logprobs": None,
    "prompt_logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}


def test_params_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == VLLM_DEFAULTS


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("temperature", 0, 0.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 2, 2.0),
        ("temperature", 1e-9, 1e-9),
        ("top_p", 1, 1.0),
        ("top_k", -1, 0),
        ("top_k", np.int64(40), 40),
        ("seed", -1, None),
        ("seed", -(2**63), -(2**63)),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [np.int32(7)], (7,)),
        ("stop_token_ids", None, ()),
        ("max_tokens", None, None),
        ("logprobs", -1, -1),
        ("logprobs", 0, 0),
        ("logit_bias", {np.int64(5): 100, 6: -100.0}, {5: 100.0, 6: -100.0}),
        ("allowed_token_ids", {3}, (3,)),
        ("bad_words", ["x"], ("x",)),
    ],
)
def test_params_normalise(name, given, kept):
    value = getattr(SamplingParams(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept) or name == "logit_bias"


LONG = "é" * 513
REFUSED = [
    ("n", 0, "n must be an integer from 1 to 64, got 0"),
    ("n", 65, "got 65; send several requests for more"),
    ("n", True, "n must be an integer from 1 to 64, got True"),
    ("n", 1.0, "n must be an integer from 1 to 64, got 1.0"),
    ("n", None, "got None"),
    ("temperature", -0.1, "temperature must be a number from 0 (greedy) to 2, got -0.1"),
    ("temperature", 2.1, "got 2.1"),
    ("temperature", math.nan, "got nan"),
    ("temperature", math.inf, "got inf"),
    ("temperature", True, "got True"),
    ("temperature", "1", "got '1'"),
    ("temperature", np.True_, "got np.True_"),
    ("temperature", 10**400, "temperature must be a number from 0 (greedy) to 2, got 1000"),
    ("top_p", 0, "top_p must be a number above 0, up to 1 (off), got 0"),
    ("top_p", 1.01, "got 1.01"),
    ("top_k", -2, "top_k must be an integer, 1 or more, or 0 or -1 for off, got -2"),
    ("top_k", 2.5, "got 2.5"),
    ("min_p", 1.5, "min_p must be a number from 0 (off) to 1, got 1.5"),
    ("presence_penalty", 2.5, "presence_penalty must be a number from -2 to 2, got 2.5"),
    ("frequency_penalty", -2.5, "frequency_penalty must be a number from -2 to 2, got -2.5"),
    ("repetition_penalty", 0, "repetition_penalty must be a finite number above 0, got 0"),
    ("repetition_penalty", math.inf, "got inf"),
    ("seed", 2**63, "seed must be an integer of 64 bits, or None, got 9223372036854775808"),
    ("seed", 1.5, "got 1.5"),
    ("stop", ["a"] * 5, "stop has 5 entries, at most 4 are allowed; send fewer"),
    ("stop", [""], "stop[0] must be a non-empty string, got ''"),
    ("stop", ["a", 3], "stop[1] must be a non-empty string, got 3"),
    ("stop", 3, "stop must be a list of strings, or one string, got 3"),
    ("stop", LONG, "stop[0] is 1026 bytes long, at most 1024 are allowed; shorten it"),
    ("stop_token_ids", list(range(129)), "has 129 entries, at most 128 are allowed"),
    ("stop_token_ids", [1, -1], "stop_token_ids[1] must be a token id (an integer, 0 or more)"),
    ("stop_token_ids", [True], "stop_token_ids[0] must be a token id"),
    ("stop_token_ids", 3, "stop_token_ids must be a list of token ids, got 3"),
    ("include_stop_str_in_output", 1, "must be True or False, got 1"),
    ("ignore_eos", "yes", "ignore_eos must be True or False, got 'yes'"),
    ("min_tokens", -1, "min_tokens must be an integer, 0 or more, got -1"),
    ("min_tokens", 17, "min_tokens is 17, more than max_tokens (16); lower min_tokens or raise"),
    ("max_tokens", 0, "max_tokens must be an integer, 1 or more, or None, got 0; None means the"),
    ("max_tokens", 16.0, "got 16.0"),
    ("logprobs", -2, "logprobs must be an integer, 0 or more, or -1 for all tokens, got -2"),
    ("logprobs", True, "got True"),
    ("prompt_logprobs", 1.5, "prompt_logprobs must be an integer"),
    (
        "logit_bias",
        {1: 100.5},
        "logit_bias[1] must be a number from -100 to 100, got 100.5; values",
    ),
    ("logit_bias", {1: math.nan}, "got nan"),
    ("logit_bias", {"1": 1}, "a key of logit_bias must be a token id"),
    ("logit_bias", {-1: 1}, "a key of logit_bias must be a token id"),
    ("logit_bias", [1], "logit_bias must be a dict of token id to number, got [1]"),
    ("logit_bias", dict.fromkeys(range(301), 1), "has 301 entries, at most 300 are allowed"),
    ("allowed_token_ids", [], "allowed_token_ids is empty, so no token could be chosen"),
    ("allowed_token_ids", ["a"], "allowed_token_ids[0] must be a token id"),
    ("bad_words", ["x"] * 129, "bad_words has 129 entries, at most 128 are allowed"),
    ("bad_words", [""], "bad_words[0] must be a non-empty string"),
    ("bad_words", "x", "bad_words must be a list of strings, got 'x'"),
    ("detokenize", None, "detokenize must be True or False, got None"),
    ("skip_special_tokens", 0, "skip_special_tokens must be True or False, got 0"),
    ("spaces_between_special_tokens", False, "spaces_between_special_tokens=False is not honoured"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_params_refuse_with_the_rule_and_the_value(name, value, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert message in str(caught.value)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "temprature is not a sampling parameter; did you mean temperature?"),
        ("stop_tokens_ids", "did you mean stop_token_ids?"),
        ("max_new_tokens", "here it is called max_tokens"),
        ("top_logprobs", "here it is called logprobs"),
        ("best_of", "best_of is not honoured: ranking unreturned samples is not available; use n"),
        ("use_beam_search", "beam search is not available; use n"),
        ("structured_outputs", "constrained output is not available"),
        ("guided_decoding", "constrained output is not available"),
        ("guided_jsn", "nor is guided_json: constrained output is not available"),
        ("logits_processors", "per-request Python callables cannot run in a compiled step"),
        ("truncate_prompt_tokens", "prompts are never cut silently"),
        ("extra_args", "there are no plug-ins that would read it"),
        ("thinking_token_budget", "limiting reasoning tokens apart is not available"),
        ("repetition_detection", "stopping on repetition is not available"),
        ("output_kind", "the choice of the call"),
        ("zzz", "zzz is not a sampling parameter; known are: n, temperature, top_p"),
    ],
)
def test_params_refuse_unknown_names(name, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: None})
    assert message in str(caught.value)
    assert caught.value.field == name


def test_params_refuse_positional_arguments():
    with pytest.raises(RequestError, match=r"keyword arguments only, got 0\.7; write for example"):
        SamplingParams(0.7)


def test_params_greedy_is_exactly_zero():
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=-0.0).is_greedy
    assert not SamplingParams(temperature=1e-30).is_greedy
    greedy = SamplingParams(temperature=0, top_k=5, top_p=0.5)
    assert (greedy.top_k, greedy.top_p) == (5, 0.5)
    with pytest.raises(
        RequestError, match="would give 2 equal answers; set n=1 or raise temp"
    ) as e:
        SamplingParams(temperature=0, n=2)
    assert e.value.field == "n"


def test_params_replace_validates_again():
    params = SamplingParams(max_tokens=8, logit_bias={1: 2.0}, seed=3)
    assert dataclasses.replace(params, max_tokens=4) == SamplingParams(
        max_tokens=4, logit_bias={1: 2.0}, seed=3
    )
    with pytest.raises(RequestError, match="max_tokens must be"):
        dataclasses.replace(params, max_tokens=0)


@pytest.mark.parametrize("name", ["cls", "self", "positional", "given"])
def test_params_refuse_the_names_of_their_own_parameters(name):
    """`cls` was the parameter of __new__, and as a field a bare TypeError, which ended a batch."""
    with pytest.raises(RequestError, match=f"{name} is not a sampling parameter") as caught:
        SamplingParams(**{name: 1})
    assert caught.value.field == name


def test_params_are_immutable():
    params = SamplingParams(logit_bias={1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    with pytest.raises(TypeError):
        params.logit_bias[1] = 3.0


def test_params_do_not_share_the_callers_dict():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 9.0
    assert params.logit_bias[1] == 2.0


def test_params_survive_pickle_and_copy():
    params = SamplingParams(temperature=0.5, logit_bias={1: 2.0}, stop=["x"], max_tokens=None)
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert copy.copy(params) == params


def test_params_repr_shows_what_differs_from_the_defaults():
    assert repr(SamplingParams()) == "SamplingParams()"
    shown = repr(SamplingParams(temperature=0, stop="x", logit_bias={1: 2}))
    assert shown == "SamplingParams(temperature=0.0, stop=('x',), logit_bias={1: 2.0})"


def test_params_import_only_the_standard_library():
    program = (
        "import sys, quire.engine.sampling_params\n"
        "print([m for m in ('numpy', 'jax', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
