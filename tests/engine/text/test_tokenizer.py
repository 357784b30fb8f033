"""Ids, texts and files: against transformers, its answers in tests/reference, mistral-common."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire.engine.errors import ModelError, RequestError
from quire.engine.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[2] / "reference"
FOLDERS = sorted(folder for folder in REFERENCE.iterdir() if folder.is_dir())
WHEEL_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00▁"), max_size=40)
FIXTURE_CHECKS = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100
)


def copy_of(folder, tmp_path, **config):
    """A folder of tests/reference without weights, with some keys of tokenizer_config.json set."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(REFERENCE / folder / name, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tokenizer_equals_the_reference(folder):
    tokenizer = Tokenizer.from_folder(folder)
    cases = json.loads((folder / "text_cases.json").read_text())
    assert len(cases["texts"]) >= 14
    for case in cases["texts"]:
        ids, bare = case["ids"], case["ids_without_special"]
        assert tokenizer.encode(case["text"]) == ids
        assert tokenizer.encode(case["text"], add_special_tokens=False) == bare
        assert tokenizer.decode(bare, skip_special_tokens=False) == case["decoded"]
        assert tokenizer.decode(ids) == case["decoded_skip_special"]
    texts = [case["text"] for case in cases["texts"]]
    assert tokenizer.encode_batch(texts) == [case["ids"] for case in cases["texts"]]
    for case in cases["chats"]:
        rendered = tokenizer.apply_chat_template(case["messages"])
        assert rendered == case["rendered"]
        assert tokenizer.encode(rendered, add_special_tokens=False) == case["ids"]


@pytest.mark.parametrize("keys", [{}, {"add_bos_token": True, "add_eos_token": True}], ids=str)
@pytest.mark.parametrize("folder", ["llama2_mha", "qwen3"])
def test_tokenizer_equals_transformers(folder, keys, tmp_path):
    """add_bos_token and add_eos_token have no effect beside a tokenizer.json."""
    from transformers import AutoTokenizer

    path = copy_of(folder, tmp_path, **keys)
    ours, theirs = Tokenizer.from_folder(path), AutoTokenizer.from_pretrained(path)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in ["Hello", " two  spaces", "<s>written</s> out<|user|>", "한국어 👩‍🚀", ""]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        for skip in (True, False):
            shown = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == shown


def test_tokenizer_adds_tokens_that_only_the_config_names(tmp_path):
    from transformers import AutoTokenizer

    tools = {"content": "<tool>", "special": False, "normalized": False}
    end = {"content": "<end>", "special": True, "normalized": False}
    path = copy_of(
        "qwen3", tmp_path, added_tokens_decoder={"513": tools, "512": end}, eos_token="<end>"
    )
    ours, theirs = Tokenizer.from_folder(path), AutoTokenizer.from_pretrained(path)
    ids = ours.encode("call<tool>now<end>")
    assert ids == theirs("call<tool>now<end>").input_ids
    assert (ours.vocab_size, ours.eos_token_id, ours.token_id("<tool>")) == (514, 512, 513)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "call<tool>now"


def test_tokenizer_reads_special_tokens_map(tmp_path):
    path = copy_of("qwen3", tmp_path)
    tokens = {"eos_token": {"content": "<|assistant|>", "lstrip": False}}
    (path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert Tokenizer.from_folder(path).eos_token == "<|assistant|>"


def test_tokenizer_ignores_truncation_and_padding_of_training(tmp_path):
    path = copy_of("qwen3", tmp_path)
    stored = Tokenizer.from_folder(path).backend
    stored.enable_truncation(3)
    stored.enable_padding(length=20)
    stored.save(str(path / "tokenizer.json"))
    plain = Tokenizer.from_folder(REFERENCE / "qwen3")
    assert Tokenizer.from_folder(path).encode("more than three") == plain.encode("more than three")


@FIXTURE_CHECKS
@given(text=WHEEL_TEXTS)
def test_tokenizer_real_tekken_equals_mistral_common(tekken, their_tekken, text):
    assert tekken.encode(text, add_special_tokens=False) == their_tekken(text)
    assert tekken.decode(tekken.encode(text)) == text


@FIXTURE_CHECKS
@given(text=st.one_of(WHEEL_TEXTS, st.text(" ab\n", max_size=12)))
def test_tokenizer_real_sentencepiece_equals_mistral_common(
    sentencepiece, their_sentencepiece, text
):
    ids = sentencepiece.encode(text, add_special_tokens=False)
    if "<s>" not in text and "</s>" not in text and "<unk>" not in text:
        assert ids == their_sentencepiece(text)
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


@pytest.mark.parametrize("name", ["tekken", "sentencepiece", "llama2_mha", "qwen3"])
def test_tokenizer_token_text_keeps_the_leading_space(tokenizer_named, name):
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode("one two three", add_special_tokens=False)
    shown = "".join(map(tokenizer.token_text, ids))
    assert shown.removeprefix(" ") == "one two three"
    assert tokenizer.token_text(tokenizer.eos_token_id) == tokenizer.eos_token
    assert tokenizer.token_text(tokenizer.vocab_size + 7) == ""


def test_tokenizer_token_text_of_a_lone_byte(tekken):
    assert tekken.token_text(1000 + 0xE4) == "\ufffd"


def test_tokenizer_without_tokenizer_json_gives_a_command_that_works(sentencepiece_folder):
    with pytest.raises(ModelError, match=r"has tokenizer\.model but no tokenizer\.json") as caught:
        Tokenizer.from_folder(sentencepiece_folder)
    message, _, command = str(caught.value).partition(" with: ")
    assert "pip install transformers sentencepiece protobuf tiktoken" in message
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=120)
    tokenizer = Tokenizer.from_folder(sentencepiece_folder)
    assert tokenizer.encode("Hello world") == [1, 22557, 1526]
    assert tokenizer.decode([1, 22557, 1526]) == "Hello world"


def test_tokenizer_without_any_file(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; add the one that was published"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read as a tokenizer: .*download it"),
        ("tokenizer.json", '{"model": 1}', r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{'a'", r"tokenizer_config\.json is not JSON: .*download it"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"must be a JSON object, it is a list"),
        ("tokenizer_config.json", '{"chat_template": 3}', r"must be a text or a list of \{name"),
        ("special_tokens_map.json", "nope", r"special_tokens_map\.json is not JSON"),
    ],
)
def test_tokenizer_unreadable_files(tmp_path, name, text, message):
    path = copy_of("qwen3", tmp_path)
    (path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(path)


def test_tokenizer_template_that_is_not_utf8(tmp_path):
    path = copy_of("qwen3", tmp_path)
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not UTF-8: .*download it again"):
        Tokenizer.from_folder(path)


USER = [{"role": "user", "content": "Hi"}]


def test_tokenizer_finds_chat_templates_by_precedence(tmp_path):
    path = copy_of("qwen3", tmp_path, chat_template="{{ 'config' }}")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'legacy' }}"}))
    assert Tokenizer.from_folder(path, chat_template="{{ 1 }}").apply_chat_template(USER) == "1"
    assert Tokenizer.from_folder(path).apply_chat_template(USER) == "<|user|>Hi</s><|assistant|>"
    (path / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(path).apply_chat_template(USER) == "legacy"
    (path / "chat_template.json").unlink()
    assert Tokenizer.from_folder(path).apply_chat_template(USER) == "config"


def test_tokenizer_named_chat_templates(tmp_path):
    named = [
        {"name": "tool_use", "template": "T{{ tools | length }}"},
        {"name": "rag", "template": "{{ 'R' }}"},
    ]
    path = copy_of("qwen3", tmp_path, chat_template=named)
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer.apply_chat_template(USER, tools=[{"type": "function"}]) == "T1"
    with pytest.raises(RequestError, match="chat template does not write them"):
        tokenizer.apply_chat_template(USER, tools=[{"type": "function"}], chat_template="rag")
    assert tokenizer.apply_chat_template(USER, chat_template="rag") == "R"
    assert tokenizer.apply_chat_template(USER, chat_template="{{ bos_token }}") == "<s>"
    (path / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match=r"several chat templates and none is the default; pass"):
        Tokenizer.from_folder(path).apply_chat_template(USER)


def test_tokenizer_without_chat_template(tekken):
    assert not tekken.has_chat_template
    with pytest.raises(RequestError, match=r"has no chat template.*pass chat_template=") as caught:
        tekken.apply_chat_template(USER)
    assert caught.value.field == "chat_template"
    with pytest.raises(RequestError, match=r"'chatml' is neither a template nor the name of one"):
        tekken.apply_chat_template(USER, chat_template="chatml")


def test_tokenizer_modules_import_neither_jax_nor_transformers_nor_numpy():
    program = (
        "import sys, quire.engine.text.detokenizer, quire.engine.text.validate\n"
        "print([m for m in ('jax', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
