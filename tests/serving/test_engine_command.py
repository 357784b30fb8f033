"""`quire engine` before it starts anything: its flags, its checks, and what the gateway is told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quire.engine.config import EngineConfig
from quire.serving import cli
from quire.serving.config import ServeConfig
from quire.serving.supervisor.command import Front
from quire.serving.supervisor.supervisor import Limits

HEAVY = (
    "jax", "jaxlib", "numpy", "transformers", "tokenizers", "grpc", "prometheus_client", "yaml",
)  # fmt: skip


class Starts:
    """Takes the place of run_engine()."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, Any], Front, Limits]] = []

    def __call__(self, engine: dict[str, Any], fronts: list[Front], limits: Limits) -> int:
        (gateway,) = fronts
        self.calls.append((engine, gateway, limits))
        return 7


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    for name in ("QUIRE_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = Starts()
    monkeypatch.setattr("quire.serving.supervisor.command.run_engine", made)
    return made


def test_options_reach_the_processes_and_the_exit_code_comes_back(starts: Starts):
    arguments = ["some/model", "--max-num-seqs", "4", "--grpc-port", "0", "--no-lazy-compile"]
    timeouts = ["--step-timeout", "2", "--drain-timeout", "0.5"]
    assert cli.main(["engine", *arguments, *timeouts, "--served-model-name", "a,b"]) == 7
    ((engine, gateway, limits),) = starts.calls
    assert engine["model"] == "some/model"
    assert EngineConfig(**engine).max_num_seqs == 4
    assert limits == Limits(step_timeout_s=2.0, drain_timeout_s=0.5)
    assert gateway.command == (sys.executable, "-P", "-m", "quire.serving.gateway")
    sent = json.loads(json.dumps(gateway.options))
    assert sent["engine"] == engine
    config = ServeConfig(**sent["serve"])
    assert (config.grpc_port, config.served_model_name, config.api_key) == (0, ("a", "b"), ())


def test_without_options_everything_is_the_default(starts: Starts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QUIRE_CACHE_DIR", raising=False)
    assert cli.main(["engine"]) == 7
    ((engine, gateway, limits),) = starts.calls
    assert (engine, gateway.options["serve"]) == ({}, {"api_key": ()})
    assert limits == Limits()


def test_keys_of_flags_and_file_are_resolved_and_on_no_command_line(starts: Starts, tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\nthird\n")
    keys = ["--api-key", "fir,st", "--api-key=second", "--api-key-file", str(file)]
    assert cli.main(["engine", "--host", "0.0.0.0", *keys]) == 7
    ((_, gateway, _),) = starts.calls
    assert gateway.options["serve"] == {
        "host": "0.0.0.0",
        "api_key": ("fir,st", "second", "third"),
    }
    assert not any(key in part for part in gateway.command for key in ("fir,st", "third"))


@pytest.mark.parametrize(
    ("environment", "arguments", "keys"),
    [
        ({"QUIRE_API_KEY": "ours"}, (), ("ours",)),
        ({"VLLM_API_KEY": "theirs"}, (), ("theirs",)),
        ({"QUIRE_API_KEY": "ours", "VLLM_API_KEY": "theirs"}, (), ("ours",)),
        ({"QUIRE_API_KEY": "ours", "VLLM_API_KEY": "theirs"}, ("--api-key", "flag"), ("flag",)),
    ],
)
def test_keys_come_from_variables_too(
    starts: Starts,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    arguments: tuple[str, ...],
    keys: tuple[str, ...],
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["engine", "--host", "0.0.0.0", *arguments]) == 7
    assert starts.calls[0][1].options["serve"]["api_key"] == keys


@pytest.mark.parametrize(
    ("device", "given", "platforms"),
    [("cpu", None, "cpu"), ("cpu", "cuda", "cuda"), ("cuda", None, None)],
)
def test_vllms_target_device_chooses_jaxs_platform(
    starts: Starts,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    given: str | None,
    platforms: str | None,
):
    """For the processes that are started; jax's own variable wins."""
    monkeypatch.setenv("JAX_PLATFORMS", given or "")
    if given is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("VLLM_TARGET_DEVICE", device)
    assert cli.main(["engine"]) == 7
    assert os.environ.get("JAX_PLATFORMS") == platforms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached by others and there is no key; give"),
        (["--api-key-file", "/no/such"], "api_key_file '/no/such' cannot be read (No such file"),
        (["--api-key="], "api_key must not be empty"),
        (["--grpc-port", "70000"], "grpc_port must be 0 (any free one) to 65535, got 70000"),
        (["--step-timeout", "0"], "step_timeout must be a finite number of seconds above 0"),
        (["--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile goes with ssl_certfile; give both"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(
    starts: Starts, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["engine", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"quire: {message}")
    assert said.err.count("\n") == 1
    assert starts.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grpc-prt", "1"], "quire engine: unknown flag --grpc-prt; did you mean --grpc-port?"),
        (["--grpc-port", "x"], "quire engine: argument --grpc-port: must be a whole number, got"),
        (["--log-level", "loud"], "quire engine: argument --log-level: invalid choice: 'loud'"),
        (["a", "b"], "quire engine: unexpected argument b"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    starts: Starts, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        cli.main(["engine", *arguments])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
    assert starts.calls == []


def test_help_has_both_groups_and_shows_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QUIRE_API_KEY", "sesame")
    with pytest.raises(SystemExit) as caught:
        cli.main(["engine", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    server, engine = text.index("\nserver:"), text.index("\nengine:")
    assert server < text.index("--grpc-port PORT", server) < engine
    assert text.index("--max-model-len TOKENS", engine)
    assert "sesame" not in text


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--grpc-prt", "1"], ["--grpc-port=-1"], ["--api-key="]],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(arguments: list[str]):
    script = f"""
import sys
from contextlib import suppress
from quire.serving.cli import main
with suppress(SystemExit):
    main(['engine', *{arguments!r}])
print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.__stderr__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""
