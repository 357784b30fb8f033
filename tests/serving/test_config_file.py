"""`--config FILE`: every key is a flag, and everything else wins over it."""

from pathlib import Path
from typing import Any

import pytest
from quire.serving import cli


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each process would be told, of the last start."""
    for name in ("QUIRE_API_KEY", "VLLM_API_KEY", "QUIRE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    told: list[dict[str, Any]] = []

    def start(engine: dict[str, Any], fronts: list[Any], _: Any) -> int:
        told[:] = [engine, *(front.options for front in fronts)]
        return 0

    monkeypatch.setattr("quire.serving.supervisor.command.run_engine", start)
    return told


def written(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text)
    return str(path)


def test_keys_of_all_kinds_reach_the_processes(started: list[dict[str, Any]], tmp_path: Path):
    path = written(
        tmp_path,
        """
        # as for vllm serve
        model: some/model
        max-model-len: 2048
        gpu_memory_utilization: 0.8
        enable-prefix-caching: false
        served-model-name: [a, b]
        api-key: "-k,1"
        port: 8001
        block-size: 32
        trust-remote-code: true
        enable-lora: false
        revision: null
        """,
    )
    assert cli.main(["serve", "--config", path]) == 0
    engine, gateway, shim = started
    assert engine == {
        "model": "some/model",
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.8,
        "enable_prefix_caching": False,
        "page_size": 32,
    }
    assert gateway["serve"] == {"served_model_name": ("a", "b"), "api_key": ("-k,1",)}
    assert shim["http"] == {"port": 8001}


def test_flags_and_variables_win(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = written(tmp_path, "max-num-seqs: 4\nseed: 1\nserved-model-name: [a]\npage-size: 8\n")
    monkeypatch.setenv("QUIRE_SEED", "2")
    flags = ["--max-num-seqs", "8", "--served-model-name", "b"]
    assert cli.main(["engine", "--config", path, *flags]) == 0
    engine, gateway = started
    assert engine == {"max_num_seqs": 8, "seed": 2, "page_size": 8}
    assert gateway["serve"]["served_model_name"] == ("b",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modl: x", "unknown flag --modl; did you mean --model?"),
        ("- a", "must be a mapping"),
        ("1: a", "unknown flag --1"),
        ("port: 1\nport: 2", "'port' stands twice"),
        ("max-model-len: 1\nmax_model_len: 2", "twice, with - and with _"),
        ("port: [1, 2]", "port takes one value, not a list"),
        ("served-model-name: {a: b}", "list of them, got {'a': 'b'}; quote what is"),
        ("served-model-name: [a, null]", "must be a plain value, or a list of them, got None;"),
        ("model: !!int 5", "must be a plain value, or a list of them, got 5; quote"),
        ("api-key: {sesame: a}", "must be a plain value, or a list of them, got dict; quote"),
        ("api-key:", "api-key is empty"),
        ("api-key: []", "api-key is empty"),
        ("enable-prefix-caching: maybe", "must be true or false, got 'maybe'"),
        ("uds: ''", "uds must be the path of a socket"),
        ("hf-overrides: {a: 2024-01-01}", "edit config.json"),
        ("hf-overrides: &x [*x]", "edit config.json"),
        ("a: \0", "not YAML"),
        ("a: [", "is not YAML"),
        ("a: " + "[" * 5000, "is nested too deeply; it is one mapping of options"),
        ("config: other.yaml", "for the command line alone"),
        ("port: many", "must be a whole number, got 'many'"),
        ("port: 70000", "port must be 0"),
        ("enable-lora: true", "LoRA adapters are not implemented yet"),
        ("speculative-config: {method: ngram}", "speculative decoding is not implemented yet"),
        ("enable-chunked-prefill: false", "no phases to switch"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    started: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    said: str,
):
    try:
        code = cli.main(["serve", "--config", written(tmp_path, text)])
    except SystemExit as end:
        code = end.code
    assert code == 2
    told = capsys.readouterr().err
    assert said in told
    assert "sesame" not in told
    assert started == []


def test_values_stay_as_they_are_written(started: list[dict[str, Any]], tmp_path: Path):
    """YAML would make false, 83, 1.1 and a date of these."""
    path = written(
        tmp_path,
        """
        api-key: [no, 0123, 1_0]
        served-model-name: [yes, 1.10, 2024-01-01]
        chat-template: "{{ off }}"
        revision: 0x1F
        enforce-eager: false
        no-enable-prefix-caching: false
        async-scheduling: false
        enable-auto-tool-choice: false
        reasoning-parser: ''
        """,
    )
    assert cli.main(["serve", "--config", path]) == 0
    engine, gateway, _ = started
    assert gateway["serve"]["api_key"] == ("no", "0123", "1_0")
    assert gateway["serve"]["served_model_name"] == ("yes", "1.10", "2024-01-01")
    assert engine == {
        "chat_template": "{{ off }}",
        "revision": "0x1F",
        "lazy_compile": False,
        "enable_prefix_caching": True,
    }


def test_key_is_not_shown_when_the_file_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = written(tmp_path, 'port: 1\napi-key: "sesame')
    assert cli.main(["serve", "--config", path]) == 2
    said = capsys.readouterr().err
    assert "line 2" in said
    assert "sesame" not in said


def test_options_that_stand_on_no_command_line_are_told_and_keys_are_not(
    started: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    path = written(tmp_path, "max-num-seqs: 4\nseed: 1\n")
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.setenv("QUIRE_SEED", "2")
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert cli.main(["engine", "--config", path, "--page-size", "8"]) == 0
    said = capsys.readouterr().err
    begins, _, told = said.splitlines()[0].partition(": from elsewhere: ")
    assert begins == "quire"
    expected = {f"max_num_seqs ({path})", "seed (QUIRE_SEED)", "api_key (VLLM_API_KEY)"}
    assert set(told.split(", ")) == expected
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN has no effect" in said
    assert "sesame" not in said


def test_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", "--config", "/nonexistent.yaml"]) == 2
    assert capsys.readouterr().err == (
        "quire: the config file /nonexistent.yaml cannot be read (No such file or directory); "
        "give a YAML file that this user can read\n"
    )


def test_file_that_is_not_utf8_is_told_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "options.yaml"
    path.write_bytes(b"model: \xff")
    assert cli.main(["serve", "--config", str(path)]) == 2
    assert "options.yaml is not text at byte 7; save it as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["m", "--served-model-name", "a", "b"], ("a", "b")),
        (["m", "--served-model-name", "a", "b", "--seed", "1"], ("a", "b")),
        (["--served-model-name", "a", "--model", "m"], ("a",)),
        (["m", "--served-model-name", "a,b", "c"], ("a", "b", "c")),
        (["--model", "m", "--served-model-name", "a", "b"], ("a", "b")),
        (["--model=m", "--served-model-name", "a", "b"], ("a", "b")),
        (["--block-size", "16", "m", "--served-model-name", "a", "b"], ("a", "b")),
        (["--enforce-eager=true", "m", "--served-model-name", "a", "b"], ("a", "b")),
    ],
)
def test_lists_may_be_several_words(
    started: list[dict[str, Any]], words: list[str], names: tuple[str, ...]
):
    assert cli.main(["engine", *words]) == 0
    engine, gateway = started
    assert engine["model"] == "m"
    assert gateway["serve"]["served_model_name"] == names


def test_model_that_may_be_a_name_is_refused(
    started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    """The embedded model would be served under the name of the one that was meant."""
    for words in (["--block-size", "16"], ["--shutdown-timeout=5"], ["--enforce-eager"], []):
        assert cli.main(["engine", *words, "--served-model-name", "a", "org/model"]) == 2
        said = capsys.readouterr().err
        assert "--served-model-name a org/model: one of these 2 may be the model" in said
        assert cli.main(["engine", *words, "--api-key", "sesame", "org/model"]) == 2
        assert "sesame" not in capsys.readouterr().err
    assert started == []


def test_theirs_in_capitals_and_empty_variables_are_taken(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("QUIRE_MODEL", "")
    assert cli.main(["engine", "--log-format", "JSON"]) == 0
    engine, gateway = started
    assert engine == {}
    assert gateway["serve"]["log_level"] == "warning"
    assert gateway["serve"]["log_format"] == "json"
