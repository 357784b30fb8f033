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
        ("1: a", "must be a mapping"),
        ("a: [", "is not YAML"),
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
    assert said in capsys.readouterr().err
    assert started == []


def test_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", "--config", "/nonexistent.yaml"]) == 2
    assert "/nonexistent.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["m", "--served-model-name", "a", "b"], ("a", "b")),
        (["m", "--served-model-name", "a", "b", "--seed", "1"], ("a", "b")),
        (["--served-model-name", "a", "--model", "m"], ("a",)),
        (["m", "--served-model-name", "a,b", "c"], ("a", "b", "c")),
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
    assert cli.main(["engine", "--served-model-name", "a", "org/model"]) == 2
    assert "write the model before the flags" in capsys.readouterr().err
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
