"""Stop strings across any split, against an oracle that reads one character at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.engine.text.stop_strings import StopStrings


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    stream = StopStrings(stops, include)
    shown = ""
    for piece in pieces:
        result = stream.push(piece)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    return shown + stream.flush(), None


LETTERS = st.text("ab한", max_size=8)


@given(
    pieces=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text("ab한", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_stop_strings_equal_the_oracle_for_any_split(pieces, stops, include):
    assert run(pieces, stops, include) == oracle("".join(pieces), stops, include)


@given(pieces=st.lists(LETTERS, max_size=8), stop=st.text("ab", min_size=1, max_size=5))
def test_stop_strings_hold_back_exactly_what_may_become_a_stop(pieces, stop):
    stream = StopStrings([stop])
    text, shown = "", ""
    for piece in pieces:
        text += piece
        result = stream.push(piece)
        shown += result.text
        if result.matched:
            return
        longest = max(k for k in range(len(stop)) if text.endswith(stop[:k]))
        assert len(text) - len(shown) == longest


def test_stop_strings_emit_at_once_what_cannot_become_a_stop():
    stream = StopStrings(["\n\nUser:"])
    assert stream.push("Hello\n").text == "Hello"
    assert stream.push("\n").text == ""
    assert stream.push("\nUse").text == "\n"
    assert stream.push("ful").text == "\n\nUseful"


@pytest.mark.parametrize(
    ("include", "shown"), [(False, "one "), (True, "one STOP")], ids=["without", "with"]
)
def test_stop_strings_end_with_or_without_the_stop_string(include, shown):
    result = StopStrings(["STOP"], include).push("one STOP two")
    assert (result.text, result.matched) == (shown, "STOP")


def test_stop_strings_complete_first_wins_then_the_longer():
    assert StopStrings(["abcd", "bc"]).push("xabcd").matched == "bc"
    assert StopStrings(["bc", "abc"]).push("xabcd").matched == "abc"


def test_stop_strings_below_min_tokens_do_not_match_and_begin_nothing():
    stream = StopStrings(["ab"])
    assert stream.push("xab", may_match=False).text == "xab"
    assert stream.push("a", may_match=False).text == "a"
    assert stream.push("b").text == "b"
    assert stream.push("ab").matched == "ab"


def test_stop_strings_stay_matched():
    stream = StopStrings(["ab"])
    assert stream.push("ab").matched == "ab"
    again = stream.push("more")
    assert (again.text, again.matched, stream.flush()) == ("", "ab", "")


def test_stop_strings_none_given_passes_everything():
    stream = StopStrings([])
    assert (stream.push("abc").text, stream.flush()) == ("abc", "")


def test_stop_strings_cost_does_not_grow_with_a_hostile_pattern():
    """Comparing every suffix with every prefix would be 10^9 steps here."""
    stream = StopStrings(["a" * 1023 + "b"] * 4)
    shown = "".join(stream.push("a").text for _ in range(20_000))
    assert len(shown) == 20_000 - 1023
