import warnings
from typing import Any

import pytest
from quire.engine.config import option_names
from quire.engine.errors import ConfigError
from quire.engine.vllm_options import REFUSED, RENAMED, WITHOUT_EFFECT, translate


def test_own_options_pass_and_renamed_ones_are_mapped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = translate({"model": "m", "block_size": 32, "enforce_eager": True, "seed": 1})
    assert got == {"model": "m", "page_size": 32, "lazy_compile": True, "seed": 1}


def test_the_tables_name_no_option_twice_and_only_real_targets():
    tables = (set(RENAMED), set(WITHOUT_EFFECT), set(REFUSED), set(option_names()))
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(RENAMED.values()) <= set(option_names())


@pytest.mark.parametrize("names", [("block_size", "page_size"), ("page_size", "block_size")])
def test_two_spellings_of_one_option_are_refused(names: tuple[str, str]):
    with pytest.raises(ConfigError) as caught:
        translate(dict.fromkeys(names, 16))
    assert str(caught.value) == f"{names[0]} and {names[1]} are the same option; give one"


def test_options_without_effect_are_said_once_with_the_reason():
    with pytest.warns(UserWarning, match="without effect here") as caught:
        assert translate({"swap_space": 4, "seed": 2, "trust_remote_code": True}) == {"seed": 2}
    assert [str(w.message) for w in caught] == [
        "without effect here: swap_space (preempted requests are recomputed), trust_remote_code "
        "(remote code is never executed; architectures are built in)"
    ]


@pytest.mark.parametrize(("name", "rule"), REFUSED.items())
def test_a_refused_option_passes_where_it_asks_for_nothing(
    name: str, rule: tuple[tuple[Any, ...], str]
):
    harmless, way_out = rule
    for value in harmless:
        assert translate({name: value}) == {}
    with pytest.raises(ConfigError) as caught:
        translate({name: "other"})
    assert str(caught.value) == f"{name} = 'other' is not available: {way_out}"


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        translate({"max_model_length": 8})
    expected = "unknown option 'max_model_length'; did you mean max_model_len?"
    assert str(caught.value) == expected
    with pytest.raises(ConfigError, match=r"unknown option 'zzz'$"):
        translate({"zzz": 8})
