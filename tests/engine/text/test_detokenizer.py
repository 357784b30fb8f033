"""Incremental decoding: any split of the ids gives the same whole, on real tokenizers too."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire.engine.text.detokenizer import IncrementalDetokenizer

NAMES = ["tekken", "sentencepiece", "llama2_mha", "qwen3"]
FIXTURE_CHECKS = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
TEXTS = [
    "Hello, world!",
    " leading and  double  spaces ",
    "👨‍👩‍👧‍👦 family, 👩🏽‍🚀 astronaut, 🇰🇷 flag",
    "한국어 텍스트와 조합형 각",
    "naïve café, ﬁne, 日本語、中文",
    "\n\n\tindented\r\nlines\n",
    "\ufffd is a character too \ufffd\ufffd",
    "e\u0301 combining \x00\x07",
]
AWKWARD = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("👨\u200d👩한가각 \n é漢\ufffd")),
    max_size=24,
)


def stream(tokenizer, prompt_ids, pieces, skip=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip)
    return "".join(detokenizer.append(piece) for piece in pieces) + detokenizer.finish()


def split(ids, cuts):
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_detokenizer_whole_is_the_text(tokenizer_named, name, text):
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stream(tokenizer, [], [[i] for i in ids]) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
@FIXTURE_CHECKS
@given(prompt=AWKWARD, text=AWKWARD, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_detokenizer_continues_the_prompt_for_any_split(tokenizer_named, name, prompt, text, cuts):
    tokenizer = tokenizer_named(name)
    before = tokenizer.encode(f"{prompt}.")
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode([*before, *ids]).removeprefix(tokenizer.decode(before))
    assert stream(tokenizer, before, split(ids, cuts)) == expected


@pytest.mark.parametrize("name", NAMES)
@FIXTURE_CHECKS
@given(data=st.data(), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_detokenizer_random_ids_give_the_same_whole_for_any_split(
    tokenizer_named, name, data, cuts
):
    """Any ids at all: half characters, special tokens, ids past the vocabulary."""
    tokenizer = tokenizer_named(name)
    low = st.integers(0, 1300)  # where the single bytes and the special tokens are
    ids = st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size + 5)), max_size=40)
    prompt_ids, token_ids = data.draw(ids), data.draw(ids)
    for skip in (True, False):
        whole = stream(tokenizer, prompt_ids, [token_ids], skip)
        assert stream(tokenizer, prompt_ids, split(token_ids, cuts), skip) == whole
        assert stream(tokenizer, prompt_ids, [[i] for i in token_ids], skip) == whole


@FIXTURE_CHECKS
@given(run=st.binary(max_size=30), text=AWKWARD)
def test_detokenizer_invalid_utf8_decodes_as_bytes_do(tekken, run, text):
    """The first 256 ranks are the bytes, after 1000 special tokens."""
    ids = [1000 + byte for byte in run + text.encode()]
    expected = (run + text.encode()).decode(errors="replace")
    assert tekken.decode(ids) == expected
    assert stream(tekken, tekken.encode("x"), [[i] for i in ids]) == expected


def test_detokenizer_endless_invalid_bytes_neither_stall_nor_vanish(tekken):
    ids = [1000 + 0xFF] * 5000
    detokenizer = IncrementalDetokenizer(tekken, tekken.encode("x"))
    pieces = [detokenizer.append([i]) for i in ids]
    assert max(map(len, pieces)) < 100
    assert "".join(pieces) + detokenizer.finish() == "\ufffd" * 5000


def test_detokenizer_skipped_special_tokens_do_not_pile_up(tekken):
    detokenizer = IncrementalDetokenizer(tekken, tekken.encode("x"))
    assert detokenizer.append([5] * 5000) == ""
    assert detokenizer.append(tekken.encode("end")) == "end"
    assert len(detokenizer._held_ids) == 0


def test_detokenizer_holds_back_an_unfinished_character(sentencepiece):
    ids = [sentencepiece.token_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    detokenizer = IncrementalDetokenizer(sentencepiece, sentencepiece.encode("x"))
    assert [detokenizer.append([i]) for i in ids] == ["", "", "", "😀"]
    assert detokenizer.append(ids[:2]) == ""
    assert detokenizer.finish().strip("\ufffd") == ""


def test_detokenizer_never_takes_back_a_character_that_bytes_made(sentencepiece):
    """Byte tokens are decoded as a run, so 0xFF after a whole character makes all of it invalid;
    the stream of the tokenizers library raises an error there."""
    ids = [sentencepiece.token_id(f"<0x{byte:02X}>") for byte in (*"你".encode(), 0xFF, ord("a"))]
    ids += sentencepiece.encode("b", add_special_tokens=False)
    shown = stream(sentencepiece, sentencepiece.encode("x"), [[i] for i in ids])
    assert (shown[0], shown[1:].strip("\ufffd")) == ("你", " b")


@pytest.mark.parametrize("name", ["sentencepiece", "llama2_mha"])
def test_detokenizer_leading_space_depends_on_the_prompt(tokenizer_named, name):
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert stream(tokenizer, tokenizer.encode("Say"), [ids]) == " Hello"
    assert stream(tokenizer, tokenizer.encode(""), [ids]) == "Hello"
    assert stream(tokenizer, [], [ids]) == "Hello"


def test_detokenizer_completes_the_character_a_prompt_ends_in(tekken):
    """A stream that begins with half a character would emit the prompt's text a second time."""
    emoji = [1000 + byte for byte in "😀".encode()]
    prompt = tekken.encode("secret")
    assert stream(tekken, prompt + emoji[:2], [emoji[2:], tekken.encode("!")]) == "😀!"
    assert stream(tekken, prompt + emoji[:2], [tekken.encode("!")]) == "!"
    assert stream(tekken, tekken.encode("secret \ufffd"), [tekken.encode(" hi")]) == " hi"
    assert stream(tekken, prompt + emoji[:2], [[]]) == ""


def test_detokenizer_shows_special_tokens_when_asked(tekken):
    ids = [*tekken.encode("a"), 2, *tekken.encode("b")]
    shown = stream(tekken, tekken.encode("x"), [ids], skip=False)
    assert shown == tekken.decode(ids, skip_special_tokens=False) != "ab"
    assert stream(tekken, tekken.encode("x"), [ids]) == "ab"
