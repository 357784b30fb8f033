"""`quire chat`: messages of several lines, commands, what is remembered, Ctrl-C."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from quire import LLM, CompletionOutput, RequestOutput
from quire.engine.errors import ConfigError
from quire.serving import cli
from quire.serving.chat.conversation import Conversation
from quire.serving.chat.reader import read_message
from quire.serving.chat.session import Session

ANSWERED_S = 120  # for a start with an empty cache on a busy machine


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=1) as engine:
        yield engine


def talk(llm: LLM, *lines: str, conversation: Conversation | None = None) -> str:
    """What the session writes."""
    written: list[str] = []
    left = iter(lines)
    talk = conversation or Conversation(sampling={"temperature": 0})
    Session(llm, talk, lambda _: next(left, None), written.append).run()
    return "".join(written)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        ([], None),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (["one\\"], "one"),
        (['"""', "a", "", "b", '"""'], "a\n\nb"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
        (['"""never', "ended"], "never\nended"),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str | None) -> None:
    left = iter(lines)
    assert read_message(lambda _: next(left, None)) == message


def test_an_answer_is_streamed_and_remembered(llm: LLM) -> None:
    conversation = Conversation(sampling={"temperature": 0})
    assert talk(llm, "What is 23 + 58?", conversation=conversation) == "23 + 58 = 81.\n"
    assert conversation.messages == [
        {"role": "user", "content": "What is 23 + 58?"},
        {"role": "assistant", "content": "23 + 58 = 81."},
    ]
    talk(llm, "/clear", conversation=conversation)
    assert conversation.messages == []


def test_stats_tell_of_the_last_answer(llm: LLM) -> None:
    assert talk(llm, "/stats") == "nothing was answered yet\n"
    line = talk(llm, "What is 23 + 58?", "/stats").splitlines()[-1]
    assert line.startswith("prompt ")
    assert "tokens/s" in line
    assert "answer 0 " not in line


def test_parameters_are_set_shown_taken_back_and_checked(llm: LLM) -> None:
    conversation = Conversation()
    said = talk(
        llm, "/set temperature 0.25", "/set", "/set temperature", "/set temperature -",
        "/set temprature 1", "/set temperature 9", "/set n 2", "/set __class__", "/set stop END",
        conversation=conversation,
    ).splitlines()  # fmt: skip
    assert said[:3] == ["max_tokens null", "temperature 0.25", "temperature 0.25"]
    assert "did you mean temperature?" in said[3]
    assert "from 0 (greedy) to 2, got 9" in said[4]
    assert "n must be 1" in said[5]
    assert "__class__ is not a sampling parameter" in said[6]
    assert conversation.sampling == {"stop": "END"}


def test_the_system_message_is_shown_and_removed(llm: LLM) -> None:
    conversation = Conversation()
    assert talk(llm, "/system Be brief.", "/system", conversation=conversation) == "Be brief.\n"
    assert conversation.prompt() == [{"role": "system", "content": "Be brief."}]
    assert talk(llm, "/system -", "/system", conversation=conversation) == "no system message\n"


def test_commands_that_do_not_exist_and_messages_like_them(llm: LLM) -> None:
    assert talk(llm, "/sett x") == "there is no command /sett; did you mean /set?\n"
    conversation = Conversation(sampling={"temperature": 0})
    talk(llm, "//set", "/bye", "What is 1 + 1?", conversation=conversation)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["/set"]


def test_a_conversation_is_saved_and_loaded(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    first = Conversation(sampling={"temperature": 0}, system="Be brief.")
    talk(llm, "hi", f"/save {file}", conversation=first)
    second = Conversation()
    assert talk(llm, f"/load {file}", conversation=second) == f"loaded 2 messages from {file}\n"
    assert second == first
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "is not a conversation"),
        ('{"system": 1, "messages": [], "sampling": {}}', "system in"),
        ('{"system": null, "messages": [{"role": "tool"}], "sampling": {}}', "messages in"),
        ('{"system": null, "messages": [], "sampling": {"temperature": 9}}', "temperature must be"),
        ('{"system": null, "messages": [], "sampling": {"n": 2}}', "n must be 1"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    llm: LLM, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_text(content)
    conversation = Conversation(system="kept")
    assert message in talk(llm, f"/load {file}", conversation=conversation)
    assert conversation == Conversation(system="kept")


def test_a_conversation_that_is_too_long_is_refused_and_goes_on(llm: LLM) -> None:
    conversation = Conversation(sampling={"temperature": 0})
    said = talk(llm, "x " * 4000, "What is 1 + 1?", conversation=conversation)
    assert "max_model_len" in said
    assert said.endswith("1 + 1 = 2.\n")
    assert len(conversation.messages) == 2


@pytest.mark.parametrize("path", ["/", ".", "~nobody-has-this-name/x", "a\0b", "/no/such/x"])
def test_files_that_cannot_be_are_one_line(llm: LLM, path: str) -> None:
    assert talk(llm, f"/save {path}").startswith(f"cannot write {path}: ")
    assert talk(llm, f"/load {path}").startswith(f"cannot read {path}: ")


def test_what_cannot_be_saved_leaves_nothing_behind(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "cannot write" in talk(llm, f"/save {tmp_path / 'folder'}")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_half_a_surrogate_pair_is_saved_and_loaded(tmp_path: Path) -> None:
    file = str(tmp_path / "talk.json")
    first = Conversation(messages=[{"role": "user", "content": "\ud800"}])
    first.save(file)
    second = Conversation()
    second.load(file)
    assert second == first


def test_values_that_are_no_json_are_text(llm: LLM) -> None:
    deep = "[" * 100_000
    assert "100000 bytes long, at most 1024" in talk(llm, f"/set stop {deep}")


def test_an_answer_stopped_before_its_first_token_is_not_remembered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        output = RequestOutput("0", None, [1], None, [CompletionOutput(0)])

        def __iter__(self) -> Iterator[None]:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    monkeypatch.setattr(LLM, "stream_chat", lambda *_: Interrupted())
    conversation = Conversation()
    talk(llm, "hello", conversation=conversation)
    assert conversation.messages == []


def test_a_failed_answer_says_why(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = CompletionOutput(0, "x", [5], finish_reason="error", stop_reason="the numbers")

    class Failed:
        output = RequestOutput("0", None, [1], None, [failed])

        def __iter__(self) -> Iterator[None]:
            return iter(())

        def close(self) -> None:
            pass

    monkeypatch.setattr(LLM, "stream_chat", lambda *_: Failed())
    assert talk(llm, "hello").endswith("ended with an error: the numbers\n")


def test_saving_where_one_cannot_says_so() -> None:
    with pytest.raises(ConfigError, match=r"cannot write /no/such/folder/talk\.json"):
        Conversation().save("/no/such/folder/talk.json")


def test_a_model_without_a_template_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(__file__).parents[1] / "reference" / "llama32_tied"
    for file in model.iterdir():
        if "chat_template" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert cli.main(["chat", str(tmp_path), "--max-model-len", "32"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    # Whoever starts the tests in the background makes their children ignore SIGINT.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from quire.serving.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat"], stdin=inside, stdout=inside, stderr=inside
    )
    os.close(inside)
    said = ""

    def wait_for(text: str, and_then: int = 0) -> None:
        """Until the text was said, and some characters after it."""
        nonlocal said
        ends = time.monotonic() + ANSWERED_S
        while text not in said or len(said.partition(text)[2]) < and_then:
            assert time.monotonic() < ends, said
            if select.select([terminal], [], [], 1)[0]:
                said += os.read(terminal, 4096).decode(errors="replace")

    try:
        wait_for(">>> ")
        os.write(terminal, b"/set ignore_eos true\n/set max_tokens 1900\n")
        os.write(terminal, b"Tell me a story.\n")
        wait_for("Tell me a story.", and_then=40)
        process.send_signal(signal.SIGINT)
        os.write(terminal, b"/stats\n")
        wait_for("tokens/s")
        process.send_signal(signal.SIGINT)
        wait_for("/bye or Ctrl-D leaves")
        os.write(terminal, b"/bye\n")
        assert process.wait(timeout=ANSWERED_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    stats = next(line for line in said.splitlines() if "tokens/s" in line)
    assert int(stats.split("answer ")[1].split()[0]) < 1900
